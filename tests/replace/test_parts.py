"""AutoEP's experts in parts against the same models with whole ones: two ranks, one process start, in fp64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from deepspeed.moe.ep_experts import EXPERT_ACTIVATIONS, GroupedExperts
from safetensors.torch import load_file
from torch import Tensor

import scmoe_ds
from lab.distributed import run_distributed
from lab.moe_families import FAMILIES, SEQUENCE, VOCABULARY, batch, tiny
from scmoe_ds.checkpoint.adapted.surgery import adapt_hugging_face
from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.errors import ArgumentError, ScMoEConfigError
from scmoe_ds.inference.attachment import moe_layers
from scmoe_ds.inference.dropping import attach_dropping
from scmoe_ds.inference.low_precision import use_low_precision
from scmoe_ds.moe.decisions.low_precision import LowPrecision
from scmoe_ds.moe.grouped import GroupedRows
from scmoe_ds.replace import moe_from_dense, replace_moe_layers
from scmoe_ds.replace.grouped_parts import GroupedParts, divide_grouped
from scmoe_ds.sparse.hugging_face_layers import fused_layers
from scmoe_ds.sparse.sparsity_file import Sparsity, curve_of, digest_of

WITH_LOSS = {"output_router_logits": True, "router_aux_loss_coef": 0.5}
BIASED = {"router": {"load_balance_coeff": 0.1}}
CASES: list[tuple[str, int, int, dict[str, Any], dict[str, Any]]] = [
    *((family, 2, 2, {}, {}) for family in FAMILIES if family not in ("mixtral", "qwen2_moe", "deepseek_v3")),
    ("mixtral", 2, 3, WITH_LOSS, {"overlap": {"calibration_steps": 0, "num_chunks": 2}}),
    ("qwen2_moe", 2, 16, WITH_LOSS, {}),
    ("deepseek_v3", 2, 4, {}, BIASED),
    ("qwen3_moe", 2, 2, {"num_experts_per_tok": 1}, {}),
    ("mixtral", 1, 2, {}, {}),
    ("longcat_flash", 1, 2, {}, {}),
    ("qwen3_moe", 2, 2, {}, {"architecture": "scmoe", "join": "late", "top_k": 2, "adapt": {"shared_expert": "mean"}}),
]
"""Family, expert-parallel ranks, parts, and what model and section have beside. The first family has 48 neurons in an
expert, the others 16."""


def config(ep: int, parts: int, section: dict[str, Any], stage: int = 1, **autoep: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 1.0,
        "expert_parallel": {"enabled": True, "autoep_size": ep, "use_grouped_mm": False, **autoep},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "scmoe": {"overlap": {"calibration_steps": 0}, "expert_partition": parts, **section},
    }


def passed(model: Any) -> dict[str, Tensor]:
    """Logits in evaluation and in training, the loss, all gradients, and how many tokens every expert got."""
    rank = dist.get_rank()
    tokens = torch.randint(VOCABULARY, (2, SEQUENCE + 3 * rank), generator=torch.Generator().manual_seed(rank))
    with torch.no_grad():
        evaluated = model.eval()(input_ids=tokens, use_cache=False).logits
    output = model.train()(input_ids=tokens, labels=tokens, use_cache=False)
    named = {name: each for name, each in model.named_parameters() if each.requires_grad}
    grads = torch.autograd.grad(output.loss, list(named.values()), allow_unused=True, materialize_grads=True)
    counts = {name: each.clone() for name, each in model.named_buffers() if name.endswith("tokens_per_expert")}
    found = {"evaluated": evaluated, "logits": output.logits.detach(), "loss": output.loss.detach()}
    return {**found, **dict(zip(named, grads, strict=True)), **counts}


def require_equal(parts: dict[str, Tensor], whole: dict[str, Tensor], case: Any) -> None:
    assert parts.keys() == whole.keys()
    for name, expected in whole.items():
        if name.endswith("tokens_per_expert"):
            assert torch.equal(parts[name], expected) and expected.any(), (case, name)
        else:
            assert (parts[name] - expected).norm() <= 1e-6 * expected.norm() + 1e-12, (case, name)


def families() -> None:
    for family, ep, parts, settings, section in CASES:
        found = []
        for number in (1, parts):
            model = tiny(family, **settings).double()
            engine = scmoe_ds.initialize(model=model, config=config(ep, number, section))[0]
            assert all(isinstance(each.experts, GroupedParts) == (number > 1) for each in layers_of(engine))
            found.append(passed(engine.module))
        require_equal(found[1], found[0], (family, ep, section))


def layers_of(engine: Any) -> list[Any]:
    return list(moe_layers(engine.module).values())


def adapted(out: Path) -> None:
    """A directory of `scmoe adapt`."""
    if dist.get_rank() == 0:
        tiny("deepseek_v2").save_pretrained(out / "source")  # type: ignore[operator]
        adapt_hugging_face(out / "source", out / "adapted", {"merge": "cg2"})
    dist.barrier()
    found = []
    for parts in (1, 2):
        given = config(2, parts, {})
        model = scmoe_ds.from_pretrained(out / "adapted", given).double()
        found.append(passed(scmoe_ds.initialize(model=model, config=given)[0].module))
    require_equal(found[1], found[0], "adapted")


def trained(engine: Any, steps: range) -> list[float]:
    losses = []
    for step in steps:
        loss = engine(**batch(step, dist.get_rank())).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def engine_of(parts: int, stage: int) -> Any:
    return scmoe_ds.initialize(model=tiny("qwen3_moe"), config=config(2, parts, {}, stage))[0]


def stages_and_checkpoints(out: Path) -> None:
    """A checkpoint is one of whole experts, whichever of the two has written it."""
    for stage in (2, 3):
        engines = {parts: engine_of(parts, stage) for parts in (1, 2)}
        losses = {parts: trained(each, range(3)) for parts, each in engines.items()}
        assert losses[2] == pytest.approx(losses[1], rel=1e-5)
    for parts, other in ((1, 2), (2, 1)):
        directory = out / f"in {parts}"
        engine, again = engine_of(parts, 2), engine_of(other, 2)
        trained(engine, range(2))
        engine.save_checkpoint(str(directory))
        scmoe_ds.save_pretrained(engine, directory / "hf")
        expected = trained(engine, range(2, 4))
        again.load_checkpoint(str(directory))
        assert trained(again, range(2, 4)) == pytest.approx(expected, rel=1e-5)
    dist.barrier()
    whole, parts_ = (load_file(next((out / f"in {parts}" / "hf").glob("*.safetensors"))) for parts in (1, 2))
    assert whole.keys() == parts_.keys() and all(each.shape == parts_[name].shape for name, each in whole.items())


@torch.no_grad()
def dropped() -> None:
    """1T-Drop leaves out all parts of a choice, or none. What parts cannot do is refused."""
    found: dict[Any, Any] = {}
    shares = torch.rand(2000, 3, generator=torch.Generator().manual_seed(0))
    criteria = (shares / shares.sum(1, keepdim=True)).flatten()
    for parts in (1, 2):
        model = tiny("qwen2_moe").double()
        fused = fused_layers(model, "qwen2_moe")
        gates, neurons = digest_of(each.gate_ED for each in fused), digest_of(each.input_FD for each in fused)
        module = scmoe_ds.initialize(model=model, config=config(2, parts, {}))[0].module.eval()
        layers = moe_layers(module)
        curves = tuple(curve_of(name, criteria, 0.05) for name in layers)
        known = {"gates": gates, "neurons": neurons, "top_k": 3, "measure": "abs-gate-up", "spread": 0.05, "tokens": 1}
        tokens = torch.randint(VOCABULARY, (2, SEQUENCE), generator=torch.Generator().manual_seed(dist.get_rank()))
        if parts > 1:
            refused = r"parts of AutoEP's experts compute whole; leave scmoe\.expert_partition out"
            with pytest.raises(ArgumentError, match=rf"--drop-method 2t: {refused}"):
                attach_dropping(module, Sparsity(layers=curves, **known), 0.4, "2t")
            with pytest.raises(ArgumentError, match=rf"low precision: {refused}"):
                use_low_precision(module, LowPrecision(score=1.0))
        for load_aware in (False, True):
            drops = attach_dropping(module, Sparsity(layers=curves, **known), 0.4, "1t", load_aware)
            found[load_aware, parts] = module(input_ids=tokens, use_cache=False).logits, drops.shares().dropped
            drops.detach()
    for load_aware in (False, True):
        (whole, share), (in_parts, of_parts) = (found[load_aware, parts] for parts in (1, 2))
        assert (in_parts - whole).norm() <= 1e-6 * whole.norm() and 0.1 < share < 0.9
        assert of_parts == pytest.approx(share)


def everything(out: Path) -> None:
    torch.set_num_threads(1)
    families()
    adapted(out)
    stages_and_checkpoints(out)
    dropped()


def test_parts_are_whole_experts_in_training_evaluation_checkpoints_and_drops(tmp_path: Path) -> None:
    run_distributed(everything, 2, tmp_path)


@pytest.mark.parametrize(("parts", "activation"), [(3, "swiglu"), (5, "geglu_tanh"), (2, "swiglu_oai"), (15, "swiglu")])
@pytest.mark.parametrize("kernel", ["loop", "grouped", "fused"])
def test_kernels_and_activations(kernel: str, parts: int, activation: str) -> None:
    """Sums over the parts are what AutoEP's own module returns and learns, with rows of some experts alone."""
    assert activation in EXPERT_ACTIVATIONS
    torch.manual_seed(0)
    grouped = kernel != "loop"
    # A part's neurons times 4 bytes is a multiple of 16, which the grouped product wants.
    experts = GroupedExperts(
        8,
        60 * (4 if grouped else 1),
        3,
        grouped,
        True,
        activation,
        gate_up_impl="fused" if kernel == "fused" else "separate",
    )
    if not grouped:
        experts.double()
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    tokens, rows = torch.randn(9, 8, dtype=experts.w1.dtype).requires_grad_(), [4, 0, 5]
    limit = 1e-6 if grouped else 1e-12

    def learned(output: Tensor) -> list[Tensor]:
        read = [tokens, *experts.parameters()]
        return [output, *torch.autograd.grad((output * torch.linspace(-1, 1, 8)).sum(), read)]

    whole = learned(GroupedRows(experts).run(tokens, rows))
    names = list(experts.state_dict())
    divide_grouped("a layer", experts, parts)
    assert list(experts.state_dict()) == names
    first, last = tokens.split([4, 5])
    copies = torch.cat([*[first] * parts, *[last] * parts])
    output = GroupedRows(experts, parts).run(copies, [each for each in rows for _ in range(parts)])
    of_first, of_last = output.split([4 * parts, 5 * parts])
    total = torch.cat([each.unflatten(0, (parts, -1)).sum(0) for each in (of_first, of_last)])
    for one, other in zip(learned(total), whole, strict=True):
        assert (one - other).norm() <= limit * other.norm()


@pytest.mark.parametrize(
    ("parts", "autoep", "more", "message"),
    [
        (3, {}, {}, "scmoe.expert_partition = 3: must divide the 16 neurons of an expert of model.layers.0.mlp"),
        (8, {"use_grouped_mm": True}, {}, "a part of 2 neurons of model.layers.0.mlp is not a multiple of 16 bytes"),
        (2, {}, {"expert_tensor_parallelism": "partition"}, "expert_parallel.expert_tensor_parallel_size says it"),
    ],
)
def test_what_autoep_cannot_have(parts: int, autoep: dict[str, Any], more: dict[str, Any], message: str) -> None:
    scmoe_ds.connect()
    with pytest.raises(ScMoEConfigError) as caught:
        scmoe_ds.initialize(model=tiny("qwen3_moe"), config=config(1, parts, more, **autoep))
    assert message in str(caught.value) and len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("field", [{"expert_partition": 2}, {"expert_tensor_parallelism": "partition"}])
def test_what_begins_as_deepspeeds_layers_has_whole_experts(field: dict[str, Any]) -> None:
    (name,) = field
    with pytest.raises(ScMoEConfigError, match=rf"scmoe.{name} = .*what moe_from_dense makes, has whole experts"):
        moe_from_dense(tiny_dense(), ScMoEConfig(num_experts=2, **field))
    with pytest.raises(ScMoEConfigError, match=rf"scmoe.{name} = .*(this package|set true or false)"):
        replace_moe_layers(tiny_dense(), {"scmoe": {"replace": True, **field}})


def tiny_dense() -> Any:
    import transformers

    settings = dict(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings))

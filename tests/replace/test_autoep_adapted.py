"""Converted layers of AutoEP models against the same model in one process, with transformers' own modules and hooks."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad
from safetensors.torch import load_file
from torch import Tensor, nn

import scmoe_ds
from lab.distributed import run_distributed
from lab.moe_families import SEQUENCE, VOCABULARY, batch, tiny
from scmoe_ds.checkpoint.adapted.surgery import adapt_hugging_face
from scmoe_ds.checkpoint.autoep.export import export_hugging_face
from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.engine.attach import prepare_autoep
from scmoe_ds.errors import CheckpointError, ScMoEConfigError
from scmoe_ds.overlap.schedule import Schedule
from scmoe_ds.replace.adapted_parts import prepare_parts, settings_of
from scmoe_ds.replace.as_is import AsIsPair
from scmoe_ds.replace.autoep import ScheduledAutoEP
from scmoe_ds.replace.hooked import HookedPair
from scmoe_ds.replace.modeling_adapted import ShortcutParts, install
from tests.replace.test_autoep_shortcuts import BEHIND_DENSE, whole

ADDED = {"shortcut_norm": "own", "adapt": {"shared_expert": "mean"}}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "half of the layers, fewer experts": (
        "qwen3_moe",
        {"num_hidden_layers": 3},
        {"top_k": 2, "join": "late", "adapt": {"layers": [0, 2]}},
    ),
    "an added shared expert": ("qwen3_moe", {}, {**ADDED, "merge": "add"}),
    "the same, weighed": ("mixtral", {}, {**ADDED, "merge": "cg2", "join": "late"}),
    "the source's shared expert, weighed": ("qwen2_moe", {}, {"merge": "cg1", "adapt": {"layers": [1]}}),
    "behind a dense block, groups of experts": (
        "deepseek_v2",
        BEHIND_DENSE,
        {"merge": "cg2", "join": "late", "shortcut_norm": "own", "first_layer_position": "pos2", "top_k": 2},
    ),
}


def tokens_of(rank: int) -> Tensor:
    return torch.randint(VOCABULARY, (2, SEQUENCE), generator=torch.Generator().manual_seed(rank))


def passed(model: nn.Module, tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and the gradients of all parameters by their names."""
    logits = model(input_ids=tokens, use_cache=False).logits
    loss = (logits * torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view_as(logits)).sum()
    named = {name: each for name, each in model.named_parameters() if each.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True, materialize_grads=True)
    return logits.detach(), dict(zip(named, found, strict=True))


def parts_of(model: nn.Module) -> list[ShortcutParts]:
    return [each for each in model.modules() if isinstance(each, ShortcutParts)]


def both(family: str, settings: dict[str, Any], given: dict[str, Any]) -> tuple[Any, nn.Module]:
    """The engine, and the model in one process, with the same weights; those of the parts are random."""
    model = tiny(family, **settings).double()
    section = ScMoEConfig.from_deepspeed(given)
    prepare_parts(model, section, given["expert_parallel"])
    torch.manual_seed(5)
    for parts in parts_of(model):
        for parameter in parts.parameters():
            nn.init.normal_(parameter, std=0.3)
    eager: Any = copy.deepcopy(model)
    eager.set_experts_implementation("eager")  # the others know no fp64
    install(eager, settings_of(section))
    return scmoe_ds.initialize(model=model, config=given)[0], eager


def close(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().max() <= 1e-5 * other.abs().max().clamp(min=1e-3))


def require_eager(engine: Any, eager: nn.Module, case: str) -> None:
    """Dense gradients are of a rank's own tokens, and those of its experts of all ranks'."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    expected = [passed(eager, tokens_of(each)) for each in range(ranks)]
    for schedule in (None, Schedule((1, 2), 2)):
        for pair in engine.overlap.pairs:
            if schedule is not None and isinstance(pair, HookedPair):
                pair.schedule = schedule
        logits, found = passed(engine.module, tokens_of(rank))
        assert close(logits, expected[rank][0]), case
        for name, gradient in found.items():
            path, _, last = name.rpartition(".")
            if path.endswith(".experts") and last in ("w1", "w2", "w3"):
                whole = sum(each[1][f"{path}.{'down_proj' if last == 'w2' else 'gate_up_proj'}"] for each in expected)
                whole = whole if last == "w2" else whole.chunk(2, dim=1)[last == "w3"]
                own = len(gradient)
                assert close(gradient, whole[rank * own :][:own]), (case, name)
            else:
                there = name.replace("router.gate", "gate").replace("shared_experts_gate", "shared_expert_gate")
                there = there if there in expected[rank][1] else there.replace("shared_experts.", "shared_expert.")
                assert close(gradient, expected[rank][1][there]), (case, name)


def compare() -> None:
    for case, (family, settings, section) in CASES.items():
        engine, eager = both(family, settings, whole(**section))
        require_eager(engine, eager, case)


def as_the_source(stage: int) -> None:
    """No layer is converted: the same bits as "as_is", whether from the start or for a while."""
    given, tokens = whole(stage, adapt={"layers": []}), tokens_of(dist.get_rank())
    as_is, converted = whole(stage, architecture="as_is"), whole(stage, join="late", **ADDED)
    expected, by_name = passed(scmoe_ds.initialize(model=tiny("qwen3_moe"), config=as_is)[0].module, tokens)
    for config in (given, converted):
        engine = scmoe_ds.initialize(model=tiny("qwen3_moe"), config=config)[0]
        if engine.conversion.numbers:
            assert not torch.equal(passed(engine.module, tokens)[0], expected)
        with engine.conversion.as_source():
            logits, found = passed(engine.module, tokens)
        assert torch.equal(logits, expected)
        for name, gradient in found.items():
            assert torch.equal(gradient, by_name[name]) if name in by_name else not gradient.any(), name
    engine.conversion.only([1])
    assert [type(layer.pair) for layer in layers_of(engine)] == [AsIsPair, HookedPair]


def layers_of(engine: Any) -> list[Any]:
    return [each for each in engine.module.modules() if isinstance(each, ScheduledAutoEP)]


def trained(config: dict[str, Any], model: nn.Module) -> Any:
    engine, rank = scmoe_ds.initialize(model=model, config=config)[0], dist.get_rank()
    for step in range(2):
        engine.backward(engine(**batch(step, rank)).loss)
        engine.step()
    return engine


def logits_of(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=tokens, use_cache=False).logits
    return found


def contents(directory: Path) -> dict[str, Tensor]:
    return {name: each for file in directory.glob("*.safetensors") for name, each in load_file(file).items()}


def files(out: Path) -> None:
    """What is written loads in transformers alone and back into training, as the ScMoE that it is."""
    section = {**ADDED, "merge": "cg2", "join": "late", "top_k": 2}
    section["adapt"] = {"layers": [2, 0], "shared_expert": "mean"}
    given, tokens = whole(2, **section), tokens_of(dist.get_rank())
    engine = trained(given, tiny("qwen3_moe", num_hidden_layers=3))
    expected = logits_of(engine.module, tokens)
    scmoe_ds.save_pretrained(engine, out / "saved")
    engine.save_checkpoint(str(out / "checkpoint"))
    engine.conversion.only([2])
    one, parts = logits_of(engine.module, tokens), len(parts_of(engine.module))
    scmoe_ds.save_pretrained(engine, out / "one")
    engine.conversion.only([])
    scmoe_ds.save_pretrained(engine, out / "none")
    for name, logits in (("saved", expected), ("one", one)):
        alone = transformers.AutoModelForCausalLM.from_pretrained(out / name, trust_remote_code=True)
        assert close(logits_of(alone, tokens), logits)
    assert parts == 2 and len(parts_of_state(out / "one")) * 2 == len(parts_of_state(out / "saved"))
    plain = transformers.AutoModelForCausalLM.from_pretrained(out / "none")
    assert type(plain).__name__ == "Qwen3MoeForCausalLM" and not parts_of_state(out / "none")
    assert close(logits_of(plain, tokens), logits_of(engine.module, tokens))

    without = {**given, "scmoe": {"overlap": {"calibration_steps": 0}}}
    again = scmoe_ds.initialize(model=scmoe_ds.from_pretrained(out / "saved", without), config=without)[0]
    assert torch.equal(logits_of(again.module, tokens), expected)
    again.load_checkpoint(str(out / "checkpoint"))
    other = scmoe_ds.initialize(model=tiny("qwen3_moe", num_hidden_layers=3), config=whole(2, **section | {"top_k": 1}))
    with pytest.raises(CheckpointError, match=r"was trained with scmoe.top_k = 2, and the model has 1"):
        other[0].load_checkpoint(str(out / "checkpoint"))
    for field, value in (("architecture", "as_is"), ("position", "pos3"), ("adapt", {"layers": [0]})):
        with pytest.raises(ScMoEConfigError, match=rf"scmoe.{field}.*saved was adapted with") as caught:
            scmoe_ds.from_pretrained(out / "saved", {**given, "scmoe": {field: value}})
        assert len(str(caught.value).splitlines()) == 1
    section = {**section, "adapt": {"layers": [1], "shared_expert": "mean"}}
    mean = scmoe_ds.initialize(model=scmoe_ds.from_pretrained(out / "none", given), config=whole(2, **section))[0]
    (shared,) = (each.shared_expert for each in parts_of(mean.module))
    assert shared is not None
    experts = plain.model.layers[1].mlp.experts
    gate, up = experts.gate_up_proj.mean(0).chunk(2)
    for linear, weight in (
        (shared.gate_proj, gate),
        (shared.up_proj, up),
        (shared.down_proj, experts.down_proj.mean(0)),
    ):
        assert torch.allclose(linear.weight, weight, atol=1e-6)  # of the experts of both ranks
    if dist.get_rank() == 0:
        export_hugging_face(out / "checkpoint", out / "exported")
        saved, exported = contents(out / "saved"), contents(out / "exported")
        assert saved.keys() == exported.keys() and all(torch.equal(saved[name], exported[name]) for name in saved)
        for file in ("config.json", "modeling_adapted.py"):
            assert (out / "saved" / file).read_text() == (out / "exported" / file).read_text()


def parts_of_state(directory: Path) -> list[str]:
    return [name for name in contents(directory) if ".shortcut." in name]


def stages() -> None:
    """The new parameters train alike under ZeRO-1 and 3, with gradients averaged over ranks; `files` has ZeRO-2."""
    found = []
    for stage in (1, 3):
        engine = trained(whole(stage, **ADDED, merge="cg1"), tiny("qwen3_moe"))
        gradients = {}
        engine.backward(engine(**batch(2, dist.get_rank())).loss)
        for name, parameter in engine.module.named_parameters():
            if ".shortcut." in name:
                gradients[name] = safe_get_full_grad(parameter).clone(), safe_get_full_fp32_param(parameter).clone()
        assert len(gradients) == 2 * 6 and all(gradient.any() for gradient, _ in gradients.values())
        found.append(gradients)
    for name, values in found[0].items():
        for other in found[1:]:
            assert all(torch.allclose(one, two, atol=1e-6) for one, two in zip(values, other[name], strict=True)), name


def everything(out: Path) -> None:
    compare()
    as_the_source(1)
    stages()
    files(out)


def test_converted_layers_are_the_eager_models(tmp_path: Path) -> None:
    run_distributed(everything, 2, tmp_path)


def repeated(converted: list[int], checkpointing: bool) -> dict[str, Tensor]:
    section = {"adapt": {"layers": [0, 1], "shared_expert": "mean"}, "merge": "cg1", "top_k": 2}
    engine = scmoe_ds.initialize(model=tiny("qwen3_moe"), config=whole(ep=1, **section))[0]
    engine.conversion.only(converted)
    engine.module.train()
    if checkpointing:
        engine.module.gradient_checkpointing_enable()
    model, tokens = engine.module, tokens_of(0)
    passed(model, tokens)  # the first pass, in one piece
    loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    engine.conversion.only([1])  # what is repeated runs as it ran first
    with torch.no_grad(), engine.conversion.as_source():
        model(input_ids=tokens, use_cache=False)
    named = dict(model.named_parameters())
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(named, found, strict=True))


@pytest.mark.parametrize("converted", [[0], [0, 1]])
def test_activation_checkpointing_repeats_what_ran(converted: list[int]) -> None:
    scmoe_ds.connect()
    one, other = repeated(converted, False), repeated(converted, True)
    assert all(torch.allclose(one[name], other[name], atol=1e-6) for name in one)


@pytest.mark.parametrize(
    ("family", "section", "message"),
    [
        ("qwen3_moe", {"merge": "cg1"}, 'merge "cg1": model.layers.0.mlp has no shared expert'),
        ("qwen2_moe", ADDED, "model.layers.0.mlp has a shared expert already"),
        ("qwen3_moe", {"adapt": {"layers": [2]}}, "scmoe.adapt.layers = [2]: the model has 2 MoE layers"),
        ("qwen3_moe", {"adapt": {"shared_expert": "busiest"}}, 'shared_expert = "busiest": is measured on text'),
        ("qwen3_moe", {"top_k": 4}, "scmoe.top_k = 4: model.layers.0.mlp routes a token to 3 experts"),
        ("qwen3_moe", {"adapt": {"source": "trained"}}, 'scmoe.adapt.source = "trained": is for scmoe pretrain'),
        ("qwen3_moe", {"architecture": "as_is", "top_k": 2}, "scmoe.top_k = 2: changes the model's mathematics"),
    ],
)
def test_what_a_model_cannot_have(family: str, section: dict[str, Any], message: str) -> None:
    with pytest.raises(ScMoEConfigError) as caught:
        scmoe_ds.initialize(model=tiny(family), config=whole(ep=1, **section))
    assert message in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_a_pass_that_failed_leaves_the_source_nothing_and_a_checkpoint_names_its_layers(tmp_path: Path) -> None:
    scmoe_ds.connect()
    engine = scmoe_ds.initialize(model=tiny("qwen3_moe"), config=whole(ep=1, join="late", top_k=2))[0]
    model, tokens = engine.module, tokens_of(0)
    assert model.num_experts_per_tok == 2  # which the balancing loss reads, as in the eager model
    with engine.conversion.as_source():
        expected = logits_of(model, tokens)
    of_student = [logits_of(model, tokens) for _ in range(2)]
    for broken in (model.model.layers[0].post_attention_layernorm, model.model.layers[1].input_layernorm):

        def fail(*_: Any) -> None:
            raise KeyboardInterrupt

        hook = broken.register_forward_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            logits_of(model, tokens)
        hook.remove()
        with engine.conversion.as_source():
            assert torch.equal(logits_of(model, tokens), expected)
    assert torch.equal(logits_of(model, tokens), of_student[-1])
    engine.save_checkpoint(str(tmp_path))
    half = whole(ep=1, join="late", top_k=2, shortcut_norm="shared", adapt={"layers": [1]})
    with pytest.raises(CheckpointError, match=r"with MoE layer 0 converted, which scmoe\.adapt\.layers leaves out"):
        scmoe_ds.initialize(model=tiny("qwen3_moe"), config=half)[0].load_checkpoint(str(tmp_path))


def test_an_adapted_directory_never_runs_as_its_source(tmp_path: Path) -> None:
    scmoe_ds.connect()
    tiny("qwen3_moe").save_pretrained(tmp_path / "source")  # type: ignore[operator]
    adapt_hugging_face(tmp_path / "source", tmp_path / "adapted", {})
    given = whole(ep=1)
    model = scmoe_ds.from_pretrained(tmp_path / "adapted", given)
    with pytest.raises(ScMoEConfigError, match=r"weights of a ScMoE, .* give the model to scmoe_ds.initialize"):
        logits_of(model, tokens_of(0))


def test_models_that_surgery_cannot_change() -> None:
    scmoe_ds.connect()
    section = ScMoEConfig.from_deepspeed(given := whole(ep=1, **ADDED))
    model: Any = tiny("qwen3_moe")
    model.lm_head.weight.ds_id = 0  # as deepspeed.zero.Init leaves it
    with pytest.raises(ScMoEConfigError, match=r"the model was made under deepspeed\.zero\.Init; load it by"):
        prepare_autoep(model, given, section)
    one = {**given["expert_parallel"], "preset_model": "qwen3_moe", "moe_layer_pattern": r"model\.layers\.1\.mlp"}
    with pytest.raises(ScMoEConfigError, match=r"takes other MoE layers than the model has"):
        prepare_parts(tiny("qwen3_moe"), section, one)
    model = tiny("qwen3_moe")
    model.config.model_type = "scmoe_qwen3_moe"
    with pytest.raises(ScMoEConfigError, match=r"runs in transformers alone; load its directory by scmoe_ds.from_pre"):
        prepare_autoep(model, given, section)

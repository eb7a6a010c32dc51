"""One run, many layouts: one process that accumulates micro-batches, and the same split over ranks in every way."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE
from torch import Tensor

import scmoe_ds
from lab.distributed import run_distributed
from scmoe_ds.compat import forget_process_groups
from scmoe_ds.models.gpt import GPT
from scmoe_ds.models.initialization import initialize_parameters
from scmoe_ds.models.layers import MLP, GPTSettings
from scmoe_ds.models.recompute import Recompute
from scmoe_ds.parallel import tensor
from scmoe_ds.training.loop import seed_micro_batch

STEPS, VOCABULARY, SEQUENCE, MICRO_BATCHES = 4, 64, 32, 4


def micro_batch(number: int) -> Tensor:
    generator = torch.Generator().manual_seed(number)
    return torch.randint(VOCABULARY, (2, SEQUENCE + 1), generator=generator)


def train(
    ep: int, zero_stage: int, tp: int, settings: dict, recompute: Recompute | None, **section: object
) -> tuple[list[float], list[float], dict[str, Tensor]]:
    """Losses and gradient norms of some steps, and the final weights by global name.

    Capacity factor 1 with random token selection and dropout: drops and random numbers must agree as well.
    """
    replicas, replica = tensor.data_parallel_size(), tensor.data_parallel_rank()
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": MICRO_BATCHES // replicas,
        "optimizer": {"type": "AdamW", "params": {"lr": 3e-3, "eps": 1e-4, "torch_adam": True, "weight_decay": 0.1}},
        "gradient_clipping": 0.5,
        "zero_optimization": {"stage": zero_stage},
        "scmoe": {
            "num_experts": 4,
            "expert_parallel_size": ep,
            "capacity_factor": 1.0,
            "min_capacity": 1,
            "top2_2nd_expert_sampling": False,
            **section,
        },
    }
    shape = GPTSettings(4, 32, 4, VOCABULARY, SEQUENCE, hidden_dropout=0.1, **settings)
    parsed = scmoe_ds.ScMoEConfig.from_deepspeed(config)
    model = GPT(shape, parsed, group=tensor.tensor_parallel_group(), recompute=recompute)
    initialize_parameters(model, 7, 0.1, shape.num_layers)
    engine, *_ = scmoe_ds.initialize(model=model, config=config)
    losses, norms = [], []
    for step in range(STEPS):
        total = torch.zeros(())
        for micro_step in range(MICRO_BATCHES // replicas):
            number = micro_step * replicas + replica
            seed_micro_batch(1, step, number)
            tokens = micro_batch(step % 2 * MICRO_BATCHES + number)  # seen again by the third step
            output = engine(tokens[:, :-1], labels=tokens[:, 1:])
            engine.backward(output.loss)
            engine.step()
            total += output.loss.detach() / MICRO_BATCHES
        dist.all_reduce(total)
        losses.append(total.item() / tp)
        norms.append(float(engine.get_global_grad_norm()))
    resolved = parsed.over_tensor_parallel(tp)
    ep_rank = dist.get_rank() // (tp if resolved.expert_tensor_parallelism else 1) % resolved.expert_parallel_size
    return losses, norms, global_weights(engine.module, ep_rank)


def global_weights(model: torch.nn.Module, ep_rank: int) -> dict[str, Tensor]:
    local = {name: module.num_local_experts for name, module in model.named_modules() if isinstance(module, MoE)}
    weights = {}
    for name, parameter in model.named_parameters():
        first = ep_rank * local.get(name.split(".deepspeed_moe.")[0], 0)
        name = re.sub(r"(?<=deepspeed_experts\.)\d+", lambda match, first=first: str(int(match[0]) + first), name)
        weights[name] = whole(parameter)
    return weights


def whole(parameter: Tensor) -> Tensor:
    rule, group = tensor.tensor_parallel_rule(parameter), tensor.tensor_parallel_group()
    mine = parameter.detach().clone()
    if rule is None or group is None:
        return mine
    parts = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, mine, group=group)
    return tensor.unshard(parts, rule)


@dataclass(frozen=True)
class Case:
    """A layout, and a model; the cases of one number of ranks share their processes."""

    ranks: int
    tp: int
    ep: int
    zero_stage: int
    section: str = "{}"  # JSON
    style: str = "GPT-2"
    recompute: Recompute | None = None

    def __str__(self) -> str:
        layout = f"{self.ranks} ranks, TP{self.tp}, EP{self.ep}, ZeRO-{self.zero_stage}"
        again = f", recompute {self.recompute}" if self.recompute else ""
        return f"{layout}, {self.style}, {self.section}{again}"

    @property
    def alone(self) -> Case:
        """The same in one process, where parts are divided among no ranks."""
        section = json.loads(self.section)
        if section.get("expert_tensor_parallelism") == "partition":
            section = {**section, "expert_tensor_parallelism": False, "expert_partition": self.tp}
        return replace(self, ranks=1, tp=1, ep=1, recompute=None, section=json.dumps(section))

    @property
    def holders(self) -> int:
        """Ranks that hold experts of their own."""
        return self.ep * (self.tp if "partition" in self.section and self.tp > 1 else 1)


def case(ranks: int, tp: int, ep: int, zero_stage: int, style: str = "GPT-2", **section: object) -> Case:
    return Case(ranks, tp, ep, zero_stage, json.dumps(section), style)


STYLES = {
    "GPT-2": {},
    "LLaMA": {
        "swiglu": True,
        "num_key_value_heads": 2,
        "tie_embeddings": False,
        "add_bias_linear": False,
        "position_embedding": "rope",
        "normalization": "RMSNorm",
    },
    "post-norm": {"norm_placement": "post", "residual_scale": 0.5},
}
MOST_DROPPED = 0.3  # as a capacity factor
DIVIDED = {"expert_tensor_parallelism": True}
IN_PARTS = {"expert_tensor_parallelism": "partition"}
IN_CHUNKS = {"overlap": {"expert_slot": 2, "num_chunks": 2}}
SERIAL, OVERLAPPED = ({"enabled": enabled, "num_chunks": 1, "calibration_steps": 0} for enabled in (False, True))
CASES = [
    *(case(*layout, 1) for layout in [(2, 1, 2), (2, 1, 1), (4, 1, 2)]),  # EP2, DP2, EP2 x DP2
    *(case(*layout, 2) for layout in [(2, 1, 2), (2, 1, 1), (4, 1, 2)]),
    case(4, 1, 2, 2, architecture="dgmoe"),
    case(2, 1, 2, 1, architecture="dgmoe", pairs_per_moe=2),
    case(2, 1, 2, 2, capacity_factor=MOST_DROPPED),
    case(2, 2, 1, 1),
    case(2, 2, 1, 2),
    case(2, 2, 1, 2, "LLaMA", **DIVIDED),
    case(2, 2, 2, 2, "LLaMA", top_k=2),
    case(2, 2, 2, 1, architecture="dgmoe"),
    case(2, 2, 2, 2, "LLaMA", join="late", moe_every=1, position="pos1"),
    replace(case(2, 2, 2, 1), recompute="full"),
    replace(case(2, 2, 1, 2, "post-norm", **DIVIDED), recompute="selective"),
    case(2, 2, 2, 2, architecture="overlapped_shared_expert"),
    case(4, 2, 2, 1),
    case(4, 2, 2, 2, overlap=SERIAL),
    case(4, 2, 2, 2, overlap=OVERLAPPED),
    case(4, 2, 2, 2, capacity_factor=MOST_DROPPED),
    case(4, 2, 2, 1, **DIVIDED),
    case(4, 2, 2, 2, **DIVIDED, capacity_factor=MOST_DROPPED),
    case(4, 2, 4, 2, dispatch="padded", top_k=2),
    case(2, 1, 2, 1, expert_partition=2, top_k=2),
    case(2, 2, 1, 2, "LLaMA", **IN_PARTS),
    case(4, 2, 2, 1, "LLaMA", **IN_PARTS, top_k=2, capacity_factor=MOST_DROPPED),
    case(4, 4, 2, 1, **IN_CHUNKS),
    case(4, 4, 2, 2, dispatch="padded", **IN_CHUNKS),
]


def drifted_gate() -> str:
    """The error of a tensor-parallel rank whose gate is not that of the other."""
    tensor.start_tensor_parallel(2)
    layer = scmoe_ds.ScMoE(8, MLP(GPTSettings(1, 8, 2, 16, 8)), num_experts=4, ep_size=2)
    layer.set_deepspeed_parallelism()
    generator = torch.Generator().manual_seed(dist.get_rank())
    layer.deepspeed_moe.gate.wg.weight.data.normal_(generator=generator)
    tokens = torch.randn(1, 32, 8, generator=torch.Generator().manual_seed(3))
    with pytest.raises(RuntimeError) as error:
        layer(tokens)
    return str(error.value)


def test_tensor_parallel_ranks_that_have_drifted_apart_say_so() -> None:
    for message in run_distributed(drifted_gate, 2):
        assert message.startswith("tensor-parallel ranks have routed the same tokens differently")


def train_all(cases: list[Case]) -> list[tuple]:
    results = []
    for each in cases:
        forget_groups()
        tensor.start_tensor_parallel(each.tp)
        results.append(
            train(each.ep, each.zero_stage, each.tp, STYLES[each.style], each.recompute, **json.loads(each.section))
        )
    return results


def forget_groups() -> None:
    """DeepSpeed caches groups by the expert-parallel size alone; one process sees several layouts here."""
    from megatron.core import parallel_state

    if parallel_state.is_initialized():
        parallel_state.destroy_model_parallel()
    tensor._Groups.tensor_parallel = tensor._Groups.data_parallel = None
    forget_process_groups()


@cache
def results(ranks: int) -> dict[Case, list[tuple]]:
    """What every rank returned, for all cases of so many ranks."""
    cases = sorted({each if ranks > 1 else each.alone for each in CASES if ranks in (1, each.ranks)}, key=str)
    by_rank = run_distributed(train_all, ranks, cases, timeout_s=600)
    return dict(zip(cases, zip(*by_rank, strict=True), strict=True))


@pytest.mark.parametrize("layout", CASES, ids=str)
def test_layouts_train_alike(layout: Case) -> None:
    """Losses, norms and weights of every rank against those of one process; all experts are somewhere."""
    [(losses, norms, weights)] = results(1)[layout.alone]
    by_rank = results(layout.ranks)[layout]
    assert losses[2] < losses[0], "the same tokens"
    for split_losses, split_norms, split_weights in by_rank:
        assert split_losses == pytest.approx(losses, rel=1e-5)
        assert split_norms == pytest.approx(norms, rel=1e-5)
        for name, weight in split_weights.items():
            assert (weight - weights[name]).abs().max() <= 1e-5 * max(1, weights[name].abs().max()), name
    assert set().union(*(held.keys() for _, _, held in by_rank)) == weights.keys()
    different = {frozenset(held.keys()) for _, _, held in by_rank}
    assert len(different) == layout.holders, "each expert-parallel rank holds experts of its own"


def test_parts_over_tensor_parallel_ranks_learn_as_divided_experts() -> None:
    """Of a model without output biases: P parts of one learn P times as fast."""
    in_parts, divided = (results(2)[case(2, 2, 1, 2, "LLaMA", **section)] for section in (IN_PARTS, DIVIDED))
    for found, expected in zip(in_parts, divided, strict=True):
        assert found[0] == pytest.approx(expected[0], rel=1e-5)
        assert found[1] == pytest.approx(expected[1], rel=1e-5)


def test_overlap_changes_no_bit_under_tensor_parallelism() -> None:
    overlapped, serial = (
        results(4)[case(4, 2, 2, 2, **section)] for section in ({"overlap": OVERLAPPED}, {"overlap": SERIAL})
    )
    for (losses, norms, weights), (serial_losses, serial_norms, serial_weights) in zip(overlapped, serial, strict=True):
        assert (losses, norms) == (serial_losses, serial_norms)
        assert all(torch.equal(weights[name], serial_weights[name]) for name in weights)

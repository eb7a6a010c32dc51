"""The block pairs that benchmarks compare: DeepSpeed's own MoE layers, and ScMoE with one thing added at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from scmoe_ds.config import ScMoEConfig
from scmoe_ds.models.blocks import PlainRun, ScheduledRun
from scmoe_ds.models.layers import GPTSettings
from scmoe_ds.moe.layer import StagedMoE
from scmoe_ds.overlap.schedule import Schedule
from scmoe_ds.overlap.transport import Transport, Wait


@dataclass(frozen=True)
class Shape:
    """Sizes of one pair on one rank."""

    name: str
    hidden_size: int
    heads: int
    sequences: int
    seq_length: int
    num_experts: int
    capacity_factor: float


SHAPES = {
    "gpt": Shape("GPT2-MoE-Medium cut to 512 wide and 4 experts, 4 × 256 tokens per rank", 512, 8, 4, 256, 4, 2.0),
    "swin": Shape("SwinV2-MoE-S stage 3, 2 experts, 8 windows of 144 tokens per rank", 384, 12, 8, 144, 2, 1.25),
}


@dataclass(frozen=True)
class Variant:
    """One way to compute a pair.

    Attributes:
        section: fields of the "scmoe" section that differ from the shape's.
        staged: for architecture topk, this package's StagedMoE instead of DeepSpeed's MoE.
        method: all-to-all primitive; "none" replaces the communication by a local copy of as many rows.
        slot: expert slot; None is the automatic one.
    """

    section: dict[str, Any]
    staged: bool = False
    method: str = "collective"
    overlap: bool = True
    slot: int | None = None


def _scmoe(position: str = "pos2", dispatch: str = "exact", method: str = "send_receive", **kwargs: Any) -> Variant:
    return Variant({"architecture": "scmoe", "position": position, "dispatch": dispatch}, method=method, **kwargs)


STOCK = "DeepSpeed top-2"
ABLATION: dict[str, Variant] = {
    STOCK: Variant({"architecture": "topk", "top_k": 2}),
    "+ shared expert (DeepSpeed Residual MoE)": Variant({"architecture": "shared_expert"}),
    "+ shortcut, serial": _scmoe(dispatch="padded", method="collective", overlap=False),
    "+ overlap": _scmoe(dispatch="padded", method="collective"),
    "+ exact dispatch": _scmoe(method="collective"),
    "+ full-duplex all-to-all = ScMoE Pos-2": _scmoe(),
}
MAIN: dict[str, Variant] = {
    **ABLATION,
    f"{STOCK} again (A/A)": ABLATION[STOCK],
    "DeepSpeed top-1": Variant({"architecture": "topk", "top_k": 1}),
    "top-2, exact dispatch, full duplex": Variant(
        {"architecture": "topk", "top_k": 2}, staged=True, method="send_receive"
    ),
    "ScMoE Pos-1": _scmoe("pos1"),
    "ScMoE Pos-3": _scmoe("pos3"),
    "ScMoE Pos-2, serial": _scmoe(overlap=False),
    "ScMoE Pos-2, no communication": _scmoe(method="none"),
}
SLOTS: dict[str, Variant] = {
    STOCK: ABLATION[STOCK],
    **{f"ScMoE Pos-{p} serial": _scmoe(f"pos{p}", overlap=False) for p in (1, 2, 3)},
    **{f"ScMoE Pos-{p} slot {s}": _scmoe(f"pos{p}", slot=s) for p in (1, 2, 3) for s in range(1, p + 3)},
}


class LocalCopy(Transport):
    """Stands in for the link in rows without communication: as many rows arrive, at once, from nowhere."""

    def launch(self, received: Tensor, rows: Tensor, receive: Sequence[int], send: Sequence[int]) -> Wait:
        kept = min(received.shape[0], rows.shape[0])
        received[:kept].copy_(rows[:kept])
        received[kept:].zero_()
        return lambda: None


def build(variant: Variant, shape: Shape, skew: float) -> nn.Module:
    """A pair of blocks on this rank, with the same weights for all variants where their names agree."""
    section = {"num_experts": shape.num_experts, "expert_parallel_size": dist.get_world_size(),
               "capacity_factor": shape.capacity_factor, **variant.section}  # fmt: skip
    config = ScMoEConfig.from_deepspeed({"scmoe": section})
    settings = GPTSettings(2, shape.hidden_size, shape.heads, 64, shape.seq_length)
    torch.manual_seed(0)
    if config.architecture in ("topk", "shared_expert"):
        run: nn.Module = PlainRun(settings, config, shape.num_experts)
        if variant.staged:
            old = run.blocks[-1].moe
            run.blocks[-1].moe = StagedMoE(
                shape.hidden_size, old.deepspeed_moe.experts.deepspeed_experts[0], shape.num_experts, old.ep_size,
                config.top_k, capacity_factor=shape.capacity_factor, top2_2nd_expert_sampling=False)  # fmt: skip
    else:
        run = ScheduledRun(settings, config, shape.num_experts, config.position, shape.seq_length)
        run.schedule = Schedule(variant.slot or run.schedule.expert_slot, overlap=variant.overlap)
    layer = run.blocks[-1].moe
    layer.set_deepspeed_parallelism()
    if isinstance(layer, StagedMoE):
        group = layer.transport.group
        layer.transport = LocalCopy(group) if variant.method == "none" else Transport(group, variant.method)
    _skew(run, skew)
    return run


def _skew(run: nn.Module, skew: float) -> None:
    """Shifts the gate's input by a constant that expert 0 likes: `skew` is added to its logit, about."""
    gate = run.blocks[-1].moe.deepspeed_moe.gate
    direction = torch.ones(gate.wg.in_features) / gate.wg.in_features**0.5
    for norm in (run.blocks[-1].mlp_norm, getattr(run, "shortcut_norm", None)):
        if norm is not None and skew:
            norm.bias.data += direction
    if skew:
        gate.wg.weight.data[0] += skew * direction


def unit(run: nn.Module, hidden: Tensor, train: bool) -> Callable[[], None]:
    """One forward pass, or one forward and backward pass; the dense gradients' all-reduce is left out."""
    direction = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))

    def step() -> None:
        if not train:
            with torch.no_grad():
                run(hidden)
            return
        output = run(hidden.requires_grad_())
        ((output.hidden * direction).sum() + output.l_aux).backward()
        run.zero_grad(set_to_none=True)
        hidden.grad = None

    return step

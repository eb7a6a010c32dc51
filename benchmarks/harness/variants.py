"""The block pairs that benchmarks compare: DeepSpeed's own MoE layers, the strong baselines, and ScMoE."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.harness.no_link import LocalCopy
from scmoe_ds.comm.transport import Transport
from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.models.layers import GPTSettings
from scmoe_ds.models.make_pairs import make_pair
from scmoe_ds.moe.layer import StagedMoE
from scmoe_ds.planner.plan import Count, Slots


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

    @property
    def tokens(self) -> int:
        """Tokens of one rank."""
        return self.sequences * self.seq_length


SHAPES = {
    "swin": Shape(
        "SwinV2-MoE-S stage 3, one expert per rank, 8 windows of 144 tokens per rank", 384, 12, 8, 144, 2, 1.25
    ),
    "swin-2": Shape("SwinV2-MoE-S stage 3, one expert per rank, 2 windows of 144 tokens", 384, 12, 2, 144, 2, 1.25),
    "gpt2-medium": Shape("GPT2-MoE-Medium, one expert per rank, 128 tokens per rank", 1024, 16, 1, 128, 2, 2.0),
    "gpt": Shape("GPT2-MoE-Medium cut to 512 wide and 4 experts, 4 × 256 tokens per rank", 512, 8, 4, 256, 4, 2.0),
}


@dataclass(frozen=True)
class Variant:
    """One way to compute a pair.

    Attributes:
        section: fields of the "scmoe" section that differ from the shape's.
        overlap: False runs the same operators with blocking communication.
        communicates: False replaces the communication by a local copy of as many rows.
        slots: for the planner: "auto", or the expert slot.
        chunks: for the planner: "auto", a number, or several of which it takes the best.
        method: all-to-all primitive, if another than that of the benchmark.
    """

    section: Mapping[str, Any] = field(hash=False)
    overlap: bool = True
    communicates: bool = True
    slots: Slots = "auto"
    chunks: Count | tuple[int, ...] = 1
    method: str | None = None

    @property
    def kind(self) -> str:
        """The same for variants that compute the same and differ in their schedule only: they share their times."""
        return ", ".join(f"{key} {value}" for key, value in sorted(self.section.items())) + f" {self.method or ''}"

    @property
    def is_scheduled(self) -> bool:
        """Whether this package runs it; otherwise it is DeepSpeed's own layer."""
        return self.section["architecture"] not in ("topk", "shared_expert")

    @property
    def position(self) -> str | None:
        """Where the shortcut is taken, None without one."""
        return self.section.get("position")


Table = dict[str, Variant]

STOCK = "DeepSpeed top-2"
RESIDUAL = "DeepSpeed Residual MoE"
AGAIN = " again (A/A)"
BASELINES = {"padded": STOCK, "exact": "top-2"}
"""The row that all others of a table are compared with, by dispatch. DeepSpeed has no exact one: there it is this
package's top-2 layer with the same dispatch, in one chunk."""
_STOCK_TABLE: Table = {
    STOCK: Variant({"architecture": "topk", "top_k": 2}),
    RESIDUAL: Variant({"architecture": "shared_expert"}),
}


def _topk(k: int, dispatch: str, **kwargs: Any) -> Variant:
    return Variant({"architecture": "pipelined_topk", "top_k": k, "dispatch": dispatch}, **kwargs)


def _scmoe(position: int, dispatch: str, top_k: int = 1, **kwargs: Any) -> Variant:
    section = {"architecture": "scmoe", "position": f"pos{position}", "top_k": top_k, "dispatch": dispatch}
    return Variant(section, **kwargs)


def _standard(k: int, dispatch: str) -> tuple[str, Variant]:
    """A top-k MoE without overlap: DeepSpeed's own where it has the dispatch."""
    if dispatch == "padded":
        return f"DeepSpeed top-{k}", Variant({"architecture": "topk", "top_k": k})
    return f"top-{k}", _topk(k, dispatch)


def baseline(dispatch: str) -> Table:
    """The row that all others are compared with."""
    return dict([_standard(2, dispatch)])


def main_table(dispatch: str) -> Table:
    """All that the paper compares, and the strong baselines."""
    name, standard = _standard(2, dispatch)
    shared = Variant({"architecture": "overlapped_shared_expert", "dispatch": dispatch})
    table = {name: standard, name + AGAIN: standard, **dict(_standard(k, dispatch) for k in (1, 3))}
    table |= {f"pipelined top-{k}": _topk(k, dispatch, chunks=(2, 4)) for k in (1, 2)}
    if dispatch == "padded":
        table |= {RESIDUAL: _STOCK_TABLE[RESIDUAL]}
    else:
        table |= {"shared expert": replace(shared, overlap=False)}
    table |= {"shared expert, overlapped": shared}
    for position in (1, 2, 3):
        scmoe, pair = _scmoe(position, dispatch), f"ScMoE Pos-{position}"
        table |= {
            f"{pair}, serial": replace(scmoe, overlap=False),
            f"{pair}, overlapped": scmoe,
            f"{pair}, chunked": replace(scmoe, chunks=2),
            f"{pair}, no communication": replace(scmoe, communicates=False),
        }
    table |= {
        "ScMoE Pos-2, auto": _scmoe(2, dispatch, chunks="auto"),
        "ScMoE-2 Pos-2, overlapped": _scmoe(2, dispatch, top_k=2),
        "DGMoE Pos-2, overlapped": Variant({"architecture": "dgmoe", "position": "pos2", "dispatch": dispatch}),
    }
    if dispatch == "exact":
        table |= {f"{name} (stock, padded)": variant for name, variant in _STOCK_TABLE.items()}
    return table


def slots_table(dispatch: str) -> Table:
    """Every slot of every position in one chunk, and the choice of the planner."""
    table = baseline(dispatch)
    for position in (1, 2, 3):
        table |= {
            f"ScMoE Pos-{position}, slot {slot}": _scmoe(position, dispatch, slots=slot)
            for slot in range(1, position + 3)
        }
        table |= {f"ScMoE Pos-{position}, auto": _scmoe(position, dispatch, chunks="auto")}
    return table


def crossing_table(dispatch: str) -> Table:
    """One chunk against several; each ScMoE is compared with its own unchunked row."""
    chunks = {"unchunked": 1, "2 chunks": 2, "4 chunks": 4, "auto": "auto"}
    return {
        f"ScMoE Pos-{position}, {name}": _scmoe(position, dispatch, chunks=count)
        for position in (1, 2)
        for name, count in chunks.items()
    }


def ablation_table(dispatch: str = "exact") -> Table:
    """From DeepSpeed's top-2 to ScMoE Pos-2, one thing added at a time; both dispatches and primitives are in it."""
    padded = _scmoe(2, "padded", method="collective")
    exact = _scmoe(2, "exact", method="collective")
    return {
        STOCK: _STOCK_TABLE[STOCK],
        "+ shared expert (DeepSpeed Residual MoE)": _STOCK_TABLE[RESIDUAL],
        "+ shortcut, serial": replace(padded, overlap=False),
        "+ overlap": padded,
        "+ exact dispatch": exact,
        "+ full-duplex all-to-all = ScMoE Pos-2": replace(exact, method="send_receive"),
        "ScMoE Pos-2, no communication": replace(exact, communicates=False),
        STOCK + AGAIN: _STOCK_TABLE[STOCK],
        "top-2, exact dispatch, full duplex": _topk(2, "exact", method="send_receive"),
    }


TABLES: dict[str, Callable[[str], Table]] = {
    "main": main_table,
    "slots": slots_table,
    "crossing": crossing_table,
    "ablation": ablation_table,
}


def selected(table: Table, kept: str, parts: Sequence[str]) -> Table:
    """The row `kept` and all rows whose name contains one of the parts, with their limits; without parts, all rows."""
    named = {name for name in table if name == kept or not parts or any(part in name for part in parts)}
    limits = {limit_of(name, table) for name in named}
    return {name: variant for name, variant in table.items() if name in named | limits}


def limit_of(name: str, table: Table) -> str | None:
    """The row that computes the same without communication, if the table has it."""
    if not table[name].communicates:
        return None
    kind = table[name].kind
    return next((other for other, variant in table.items() if variant.kind == kind and not variant.communicates), None)


@contextmanager
def one_primitive(method: str) -> Iterator[None]:
    """Gives DeepSpeed's own layers the all-to-all that this package's have, so that only the schedules differ."""
    if method == "collective":  # is what they use
        yield
        return

    def exchange(output: Tensor, input: Tensor, group: dist.ProcessGroup) -> None:
        equal = [input.shape[0] // dist.get_world_size(group)] * dist.get_world_size(group)
        Transport(group, method).launch(output, input, equal, equal)()

    with mock.patch.object(deepspeed.comm, "all_to_all_single", exchange):
        yield


def build(variant: Variant, shape: Shape, skew: float, method: str = "collective") -> nn.Module:
    """A pair of blocks on this rank, with the same weights for all variants where their names agree.

    Top-3 needs three experts at least; it gets as many as divide among the ranks.
    """
    ranks = dist.get_world_size()
    num_experts = max(shape.num_experts, -(-variant.section.get("top_k", 1) // ranks) * ranks)
    section = {
        "num_experts": num_experts,
        "expert_parallel_size": ranks,
        "capacity_factor": shape.capacity_factor,
        **variant.section,
    }
    config = ScMoEConfig.from_deepspeed({"scmoe": section})
    settings = GPTSettings(2, shape.hidden_size, shape.heads, 64, shape.seq_length)
    torch.manual_seed(0)
    run = make_pair(settings, config, num_experts, config.position, shape.seq_length)
    layer = run.blocks[-1].moe
    layer.set_deepspeed_parallelism()
    if isinstance(layer, StagedMoE) and layer.transport.size > 1:
        transport = Transport if variant.communicates else LocalCopy
        layer.transport = transport(layer.transport.group, variant.method or method)
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

"""Copies of hot experts for a model under expert parallelism: memory for them, their weights, and what they brought.

    copies = copy_experts(model, 1)      # on every rank: room for one copy per MoE layer
    …                                    # the first passes count loads; then copies are chosen and filled
    print(copies.summary())

Which rows go where: scmoe_ds.moe.decisions.copied.
"""

from __future__ import annotations

import copy
import json
import os
import statistics
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from scmoe_ds.comm.transport import probe, synchronize
from scmoe_ds.data.durable_files import write_whole
from scmoe_ds.errors import ArgumentError, reason_of
from scmoe_ds.inference.attachment import COPIES, LOADS, Attachment, Place, check
from scmoe_ds.models.gpt import GPT
from scmoe_ds.moe.decisions.copied import CopiedExperts
from scmoe_ds.moe.decisions.copies import Copy, Costs, choose_copies
from scmoe_ds.moe.layer import StagedMoE
from scmoe_ds.parallel.agreement import gather, run_together

FEW_ROWS, MANY_ROWS, ROUNDS = 1, 129, 5
_FREE = Costs(0.0, 1.0, 0.0)


class Copies(Attachment):
    """The copies of a model on this rank.

    Attributes:
        rules: of its MoE layers, in their order.
        per_rank: copies of a rank and layer, at most.
        bytes_per_rank: that they take on this rank.
    """

    def __init__(
        self, places: Sequence[Place], rules: Sequence[CopiedExperts], per_rank: int, bytes_per_rank: int
    ) -> None:
        super().__init__(places)
        self.rules, self.per_rank, self.bytes_per_rank = rules, per_rank, bytes_per_rank

    def counted(self) -> list[list[int]]:
        """Rows of each expert of each MoE layer so far, of all ranks of this rank's expert-parallel group."""
        return [[] if rule.counted_E is None else rule.counted_E.tolist() for rule in self.rules]

    def save(self, path: str | Path) -> None:
        """Writes the loads that another run can choose its copies by.

        Raises:
            ArgumentError: the file cannot be written.
        """
        try:
            write_whole(Path(path), json.dumps({"loads": self.counted()}) + "\n")
        except OSError as error:
            raise ArgumentError(f"--save-expert-loads {path} cannot be written ({reason_of(error)})") from None

    def summary(self) -> str:
        """One line: how many copies, which share of the rows went to them, and the greatest load of a rank."""
        active = [rule.loads for rule in self.rules if rule.loads.rows]
        if not active:
            return "expert copies: none were chosen, too few tokens were read; --expert-loads has copies from the start"
        ranks = self.rules[0].ranks
        rows, moved = sum(each.rows for each in active), sum(each.moved for each in active)
        before, after = (
            sum(getattr(each, name) for each in active) * ranks / rows for name in ("greatest_before", "greatest")
        )
        return (
            f"expert copies: {self.per_rank} per rank and layer ({self.bytes_per_rank / 1e9:.3g} GB per rank), "
            f"{100 * moved / rows:.0f} % of the rows moved, greatest load of a rank over the mean {before:.2f} -> "
            f"{after:.2f}"
        )


def copy_experts(
    model: GPT, per_rank: int, loads: Sequence[Sequence[float]] | None = None, costs: Costs | None = None
) -> Copies:
    """Gives every rank room for copies of other ranks' experts, in every MoE layer. Collective.

    Results do not change, but for the last bits of matrix products that depend on their number of rows. The model can
    be used in evaluation mode alone from now on.

    Args:
        model: a GPT of this package, whose experts are on the device.
        per_rank: copies of each rank and layer; 0 only counts loads.
        loads: rows of each expert of each MoE layer, to choose copies by; None: those of the first passes.
        costs: of rows on this machine; None: they are measured.

    Raises:
        ArgumentError: another model, or copies that this layout has no use for, or memory no room.
    """
    layers = _layers(model)
    _check(layers, per_rank)
    if loads is not None:
        _check_loads(layers, loads)
    each_bytes = [_bytes(layer.deepspeed_moe.experts.deepspeed_experts[0]) for layer in layers]
    # On their way, copies of one layer lie there once more: those for this rank, and at most all of the other ranks.
    travel_bytes = layers[0].slices.group_size * max(each_bytes)
    run_together(partial(_check_memory, per_rank, sum(each_bytes) + travel_bytes, model.embedding.weight.device))
    if per_rank and costs is None:
        costs = measured_costs(layers[0])
    rules = []
    places: list[Place] = []
    for layer in layers:
        container, choose = layer.deepspeed_moe.experts, partial(_fill, layer, per_rank) if per_rank else _none
        rules.append(CopiedExperts(per_rank, costs or _FREE, layer.slices.group_size, choose))
        home = list(container.deepspeed_experts)
        copies = [copy.deepcopy(home[0]) for _ in range(per_rank)]
        places += [(layer, "early_rule", rules[-1]), (container, "deepspeed_experts", nn.ModuleList(home + copies))]
    found = Copies(places, rules, per_rank, per_rank * sum(each_bytes))
    for rule, loads_E in zip(rules, loads or (), strict=True) if per_rank and loads is not None else ():
        rule.copies = rule.choose(loads_E)
    return found


class _Loads(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    loads: list[list[Annotated[float, Field(ge=0)]]]


def read_loads(path: str | Path) -> list[list[float]]:
    """What `Copies.save` wrote: rows of each expert of each MoE layer.

    Args:
        path: of the file.

    Raises:
        ArgumentError: no such file, or another one.
    """
    try:
        loads = _Loads.model_validate_json(Path(path).read_bytes()).loads
    except OSError as error:
        raise ArgumentError(f"--expert-loads {path}: cannot be read ({reason_of(error)})") from None
    except ValueError:
        raise ArgumentError(f"--expert-loads {path}: is no file of loads; write one with --save-expert-loads") from None
    if not any(map(any, loads)):
        raise ArgumentError(
            f"--expert-loads {path}: all loads are 0, which tells no expert as hot; measure with more text"
        )
    return loads


def measured_costs(layer: StagedMoE) -> Costs:
    """Milliseconds of an expert, of its rows and of rows that travel, the largest of all ranks. Collective."""
    experts = list(layer.deepspeed_moe.experts.deepspeed_experts)
    weight = next(experts[0].parameters())
    rows_RD = torch.randn(MANY_ROWS, layer.hidden_size, dtype=weight.dtype, device=weight.device)
    span = MANY_ROWS - FEW_ROWS
    few_ms, many_ms = (_milliseconds(experts, rows_RD[:rows]) for rows in (FEW_ROWS, MANY_ROWS))
    sent = [
        probe({"": layer.transport}, rows, layer.hidden_size, weight.dtype, weight.device, ROUNDS).milliseconds[""]
        for rows in (FEW_ROWS, MANY_ROWS)
    ]
    row_ms = max(many_ms - few_ms, 0.0) / span
    travel_ms = 2 * max(sent[1] - sent[0], 0.0) / (span * (layer.transport.size - 1))
    return Costs(*map(max, *gather((max(few_ms - row_ms, 0.0), row_ms, travel_ms))))


@torch.inference_mode()
def _milliseconds(experts: Sequence[Any], rows_RD: Tensor) -> float:
    """The median time of an expert; each of them in turn, so that no weights lie in a cache."""
    times = []
    for _ in range(ROUNDS + 1):
        for expert in experts:
            synchronize(rows_RD.device)
            started = time.perf_counter()
            expert(rows_RD)
            synchronize(rows_RD.device)
            times.append(1e3 * (time.perf_counter() - started))
    return statistics.median(times[len(experts) :])


def _layers(model: GPT) -> list[StagedMoE]:
    if not isinstance(model, GPT):
        raise ArgumentError(
            f"model = {type(model).__name__}: only a GPT of this package can have copies of experts; "
            "docs/from_hugging_face.md says what others can have"
        )
    return [pair.layer for pair in model.scheduled_pairs() if pair.last.owns_moe]


def _check(layers: Sequence[StagedMoE], per_rank: int) -> None:
    flag = f"--expert-copies {per_rank}" if per_rank else "--save-expert-loads"
    check(layers, [COPIES if per_rank else LOADS], flag)
    least = min(layer.num_experts - layer.num_experts // layer.ep_size for layer in layers)
    if per_rank > least:
        raise ArgumentError(f"{flag}: must be at most {least}, as other ranks have no more experts in a layer")


def _check_loads(layers: Sequence[StagedMoE], loads: Sequence[Sequence[float]]) -> None:
    given, expected = [len(loads_E) for loads_E in loads], [layer.num_experts for layer in layers]
    if given != expected:
        raise ArgumentError(
            f"--expert-loads: has layers of {given} experts and the model of {expected}; measure this model"
        )


def _check_memory(per_rank: int, each_bytes: int, device: torch.device) -> None:
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        import psutil

        free = psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if per_rank * each_bytes > free:
        remedy = f"give at most {free // each_bytes}" if free >= each_bytes else "leave the flag out"
        raise ArgumentError(
            f"--expert-copies {per_rank}: take {per_rank * each_bytes / 1e9:.3g} GB on each rank, and "
            f"{free / 1e9:.3g} GB are free; {remedy}"
        )


def _bytes(module: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())


def _none(loads_E: Sequence[float]) -> list[Copy]:
    return []


@torch.no_grad()
def _fill(layer: StagedMoE, per_rank: int, loads_E: Sequence[float]) -> list[Copy]:
    """Chooses copies and brings their weights. Collective over the expert-parallel ranks."""
    transport, rank, local_experts = layer.transport, layer.slices.rank, layer.num_local_experts
    copies = choose_copies(loads_E, transport.size, per_rank)
    members = layer.deepspeed_moe.experts.deepspeed_experts
    home = [each.expert // local_experts for each in copies]
    sent = [each for each, source in zip(copies, home, strict=True) if source == rank]
    places = {each: place for place, each in enumerate(each for each in copies if each.rank == rank)}
    received = sorted(places, key=lambda each: each.expert // local_experts)
    numbers, like = sum(each.numel() for each in members[0].parameters()), next(members[0].parameters())
    sent_RW, received_RW = (like.new_empty(len(each), numbers) for each in (sent, received))
    for row_W, each in zip(sent_RW, sent, strict=True):
        for parameter, part in _parts(members[each.expert % local_experts], row_W):
            part.copy_(parameter)
    to_P = [sum(each.rank == other for each in sent) for other in range(transport.size)]
    from_P = [sum(each.expert // local_experts == other for each in received) for other in range(transport.size)]
    transport.launch(received_RW, sent_RW, from_P, to_P)()
    for row_W, each in zip(received_RW, received, strict=True):
        for parameter, part in _parts(members[local_experts + places[each]], row_W):
            parameter.copy_(part)
    return copies


def _parts(expert: nn.Module, row_W: Tensor) -> list[tuple[Tensor, Tensor]]:
    """An expert's parameters, and views of their shapes on a row of all its numbers."""
    parameters = list(expert.parameters())
    parts = row_W.split([each.numel() for each in parameters])
    return [(each, part.view_as(each)) for each, part in zip(parameters, parts, strict=True)]

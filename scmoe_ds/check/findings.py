"""What a checked step says: lines for people, JSON for programs, and an error when the memory does not suffice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from scmoe_ds.check.step import Findings, Place
from scmoe_ds.check.work import Message, Work
from scmoe_ds.errors import OutOfMemoryError
from scmoe_ds.training.step_text import rounded
from scmoe_ds.training.utilization import peak_tflops

BESIDE_TENSORS = 2 * 10**9
"""Bytes: a guess for the CUDA context, NCCL's buffers, and what the allocator holds but cannot use."""


def needed(found: Findings) -> int:
    """Bytes of the card that a rank needs."""
    return found.peak + BESIDE_TENSORS


def require_room(found: Findings, place: Place) -> None:
    """
    Raises:
        OutOfMemoryError: the card has less than `needed`.
    """
    if needed(found) > place.card.memory_bytes:
        reason = f"a rank needs {_gb(needed(found))}, and {place.card.name} has {_gb(place.card.memory_bytes)}"
        raise OutOfMemoryError("", reason)


def lines(found: Findings, place: Place, source: str) -> list[str]:
    """The findings for people: a heading, then a line per subject."""
    nodes = -(-place.ranks // place.per_node)
    heading = (
        f"{source}: a step of rank {place.rank} of {place.ranks} × {place.card.name} on {nodes} "
        f"node{'s' * (nodes > 1)}, run without a GPU"
    )
    return [heading, *(f"  {name:<11}{text}" for name, text in _rows(found, place).items())]


def _rows(found: Findings, place: Place) -> dict[str, str]:
    card = place.card.memory_bytes
    free = f"{100 * (1 - needed(found) / card):.0f} % of {_gb(card)} are free"
    fits = free if needed(found) <= card else f"does not fit into {_gb(card)}"
    peak = peak_tflops(place.card.name, found.dtype)
    least = (
        f"{1e3 * found.flops / peak / 1e12:.3g} ms a step at {peak:g} TFLOP/s, the peak of {place.card.name} in "
        f"{str(found.dtype).removeprefix('torch.')}, if nothing but products took time"
        if peak
        else f"not known: no peak of {place.card.name} for {found.dtype}"
    )
    return {
        "parameters": f"{rounded(found.parameters)} on this rank",
        "memory": f"{_gb(found.peak)} of tensors at most, and about {_gb(BESIDE_TENSORS)} of CUDA and NCCL: {fits}",
        "at most": _parts(found.memory),
        "between": f"{_parts(found.resident)}, between two steps",
        "sent": _sent_per_layer(found),
        "": _sent_per_step(found),
        "FLOPs": f"{found.flops / 1e12:.4g} TFLOP a step, counted; {found.shape_flops / 1e12:.4g} by the model's "
        "shape, without what is computed again",
        "time": least,
        "host reads": f"{found.host_reads} a step by DeepSpeed, beside the row counts of the exact dispatch",
    }


def _gb(size: float) -> str:
    return f"{size / 1e9:.3g} GB" if size >= 1e8 else f"{size / 1e6:.3g} MB"


def _parts(memory: dict[str, int]) -> str:
    parts = sorted(memory.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {_gb(size)}" for name, size in parts if size >= 1e5) or "nothing"


def of_layers(work: Work) -> dict[int, list[Message]]:
    """The messages of each MoE layer."""
    layers: dict[int, list[Message]] = {}
    for message in work.messages:
        if message.layer is not None:
            layers.setdefault(message.layer, []).append(message)
    return layers


def _sent_per_layer(found: Findings) -> str:
    work = found.micro_batch
    layers = of_layers(work)
    if not layers:
        exchanged = [each for each in work.messages if each.collective == "all-to-all"]
        per_layer = f"{_links(exchanged, found.moe_layers)} by all-to-all" if exchanged else "nothing"
        return f"{per_layer} per MoE layer and micro-batch"
    texts = Counter(_links(messages) for messages in layers.values())
    each = "; ".join(f"{text} ({count} layer{'s' * (count > 1)})" for text, count in texts.items())
    return f"{each} per MoE layer and micro-batch: rows and their gradients"


def _sent_per_step(found: Findings) -> str:
    others: dict[str, list[Message]] = {}
    for message in found.last_micro_batch.messages:
        if message.layer is None and message.collective != "all-to-all":
            others.setdefault(message.collective, []).append(message)
    texts = [f"{name} {_links(messages)}" for name, messages in others.items() if sum(map(_size, messages))]
    return f"{', '.join(texts) or 'nothing'} with the last micro-batch of a step"


def _size(message: Message) -> float:
    return message.inside + message.across


def _links(messages: Iterable[Message], layers: int = 1) -> str:
    inside, across = sum(each.inside for each in messages), sum(each.across for each in messages)
    if not inside + across:
        return "nothing"
    return f"{_gb(inside / layers)} inside the node" + (f" and {_gb(across / layers)} to other nodes" if across else "")


def as_json(found: Findings, place: Place) -> dict[str, Any]:
    """The findings for programs; sizes in bytes."""
    peak = peak_tflops(place.card.name, found.dtype)
    return {
        "rank": place.rank,
        "world_size": place.ranks,
        "gpus_per_node": place.per_node,
        "card": place.card.name,
        "card_bytes": place.card.memory_bytes,
        "parameters": found.parameters,
        "peak_bytes": found.peak,
        "needed_bytes": needed(found),
        "fits": needed(found) <= place.card.memory_bytes,
        "at_peak": found.memory,
        "between_steps": found.resident,
        "flops": found.flops,
        "flops_by_shape": found.shape_flops,
        "least_seconds": found.flops / peak / 1e12 if peak else None,
        "accumulation_steps": found.accumulation_steps,
        "host_reads": found.host_reads,
        "sent": {
            name: [vars(each) for each in work.messages]
            for name, work in (("micro_batch", found.micro_batch), ("last_micro_batch", found.last_micro_batch))
        },
    }

"""Where every "auto" of the "scmoe" section becomes a value: `expert_slot`, `num_chunks` and `all_to_all`.

Until the times of a model are known, `first_schedule` chooses slot and chunks. The calibrator then times what
`chunk_counts` says, and the planner chooses. The all-to-all is chosen by a probe.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from torch import nn

from scmoe_ds.comm.hierarchical import make_transports
from scmoe_ds.comm.transport import Transport, probe
from scmoe_ds.config.overlap_section import OverlapConfig
from scmoe_ds.errors import ScMoEConfigError
from scmoe_ds.moe.stages import staged_layers
from scmoe_ds.overlap.schedule import Schedule
from scmoe_ds.parallel.groups import Layout, nodes_of_ranks
from scmoe_ds.parallel.output import log
from scmoe_ds.planner.plan import slot_that_halves
from scmoe_ds.planner.simulation import Mode

CHUNK_COUNTS = (1, 2, 4)
"""Numbers of chunks that "auto" chooses from. Each further one would cost timed steps. Beyond four chunks, launches and
small matrix products eat the gain."""
NCCL_MARGIN = 0.1
"""On NCCL both primitives send the same messages; a smaller difference between them is noise."""


def first_schedule(overlap: OverlapConfig, costs: Sequence[float], late: float = 0) -> Schedule:
    """A pair's schedule as long as no times are known: "auto" is the slot that halves the backbone, and one chunk.

    Args:
        costs: of the backbone's operators, in any common unit; none: their number is not known yet.
        late: cost of the next pair's operators before a late join.
    """
    slot, chunks = overlap.expert_slot, overlap.num_chunks
    slots = slot_that_halves(costs, late) if isinstance(slot, str) else tuple(slot) if isinstance(slot, list) else slot
    if isinstance(chunks, str):
        chunks = len(slots) if isinstance(slots, tuple) else 1
    return Schedule(slots, chunks, overlap.enabled)


def leaves_a_choice(overlap: OverlapConfig) -> bool:
    """Whether measured times decide on the slot or on the number of chunks."""
    chunks_are_free = overlap.num_chunks == "auto" and isinstance(overlap.expert_slot, int)
    return overlap.enabled and (overlap.expert_slot == "auto" or chunks_are_free)


def chunk_counts(overlap: OverlapConfig) -> tuple[int, ...]:
    """The numbers of chunks that have to be timed; 1 is always among them."""
    chunks = overlap.num_chunks
    return CHUNK_COUNTS if isinstance(chunks, str) else tuple({1: None, chunks: None})


def choose_all_to_all(
    model: nn.Module, setting: str, layout: Layout, tokens: int, mode: Mode = "train"
) -> Transport | None:
    """Gives every MoE layer whose rows travel the all-to-all of the section, and says so in the log.

    "auto" is the fastest one in a probe with a layer's balanced message; on NCCL, another than "collective"
    has to win by `NCCL_MARGIN`. Collective over the world.

    Args:
        setting: `scmoe.all_to_all`.
        tokens: of one pass of the mode on each rank, about.

    Returns:
        the all-to-all; None if the model has no such layer.

    Raises:
        ScMoEConfigError: "hierarchical" on GPUs, or for groups that do not span equally filled nodes.
    """
    layers = [each for each in staged_layers(model) if each.transport.size > 1]
    if not layers:
        return None
    layer, group = layers[0], layers[0].transport.group
    assert group is not None
    weight = next(layer.parameters())
    transports = make_transports(group, layout.exchange, nodes_of_ranks(), weight.device)
    if setting == "auto":
        rows = max(tokens * layer.top_k // layer.transport.size, 1)
        times = probe(transports, rows, layer.hidden_size, weight.dtype, weight.device)
        chosen, origin = times.choice(NCCL_MARGIN if weight.is_cuda else 0.0), f"auto; {times}"
    elif setting in transports:
        chosen, origin = setting, "set by scmoe.all_to_all"
    else:
        needs = "needs expert-parallel groups over several nodes with the same number (at least 2) of ranks on each"
        if weight.is_cuda:
            needs = "is for CPUs; on GPUs NCCL itself combines the messages of a node (PXN)"
        raise ScMoEConfigError(f'scmoe.all_to_all = "{setting}": {needs}; use one of {", ".join(transports)} or auto')
    for each in layers:
        each.transport = transports[chosen]
    matters = setting != "auto" or len(set(nodes_of_ranks())) > 1
    text = f"{'' if mode == 'train' else f'{mode}: '}all-to-all: {chosen} ({origin})"
    log(text, level=logging.INFO if matters else logging.DEBUG)
    return transports[chosen]

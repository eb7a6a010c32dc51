"""All measurements of a machine, in turns, to its profile."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain

import torch

from scmoe_ds.parallel.agreement import gather
from scmoe_ds.parallel.groups import nodes_of_ranks
from scmoe_ds.parallel.process import device
from scmoe_ds.probe.attention import attentions
from scmoe_ds.probe.bench import Bench
from scmoe_ds.probe.beside import slowdowns
from scmoe_ds.probe.clock import ColdClock
from scmoe_ds.probe.collectives import exchanges
from scmoe_ds.probe.environment import device_bytes, device_name, software
from scmoe_ds.probe.groups import Exchanging, exchanging
from scmoe_ds.probe.passes import copies, launches, passes, updates
from scmoe_ds.probe.products import experts, products
from scmoe_ds.probe.results import profile_of
from scmoe_ds.probe.sizes import ALL, Sizes
from scmoe_ds.probe.trials import Ladder, climb, in_turns
from scmoe_ds.simulate.gpu import PeakOf
from scmoe_ds.simulate.profile import Profile

LONGEST = 1 / 500
"""Of the whole time, what one trial may take."""
MOST_BYTES = {"cpu": 64 << 20, "cuda": 1 << 29}
"""Of one tensor. All tensors of a precision that are held at once are ten times as large at most."""
LEAST_PART = 64
"""A tensor has no more than this part of the smallest rank's memory."""


def measure(seconds: float, precisions: Sequence[PeakOf], sizes: Sizes = ALL) -> Profile:
    """Measures this world of ranks. Collective; the same on every rank.

    Args:
        seconds: that it takes, about; everything is measured five times at least.
    """
    started = time.perf_counter()
    nodes = Counter(nodes_of_ranks())
    per_node = max(nodes.values())
    memory = min(gather(device_bytes(per_node)))  # or ranks would time different sizes, and wait for each other
    clock = ColdClock(device(), sizes.evicted)
    most_bytes = min(MOST_BYTES[clock.device.type], int(memory) // LEAST_PART)
    benches = [Bench(clock, precision, most_bytes, sizes) for precision in precisions]
    trials = climb(ladders(clock, benches, exchanging()), 1e3 * seconds * LONGEST)
    samples = in_turns(trials, seconds - (time.perf_counter() - started), sizes.rounds)
    return profile_of(
        samples,
        device=device_name(),
        software=software(),
        capability=_capability(),
        memory=memory,
        nodes=len(nodes),
        gpus_per_node=per_node,
    )


def ladders(clock: ColdClock, benches: Sequence[Bench], groups: Sequence[Exchanging]) -> Iterator[Ladder]:
    """Everything that is measured: a machine's, each precision's, each group's."""
    yield copies(benches[0])
    yield from launches(clock)
    yield updates(benches[0])
    for bench in benches:
        yield from chain(products(bench), experts(bench), attentions(bench), passes(bench))
    for group in groups:
        yield from exchanges(clock, group, benches[0].sizes.sent)
        yield from slowdowns(benches[-1], group)


def _capability() -> tuple[int, int]:
    return torch.cuda.get_device_capability() if device().type == "cuda" else (0, 0)

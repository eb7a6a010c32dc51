"""A profile as a table for people."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence

from scmoe_ds.probe.results import BY_FLOPS
from scmoe_ds.simulate.gpu import Measured
from scmoe_ds.simulate.profile import CollectiveTimes, Profile


def table(profile: Profile, details: bool = False) -> list[str]:
    """Lines: the machine, what it computes, what it sends.

    Args:
        details: one line for every kernel, not only the slowest and the fastest of its kind.
    """
    return [*_machine(profile), "", *_kernels(profile, details), "", *_sent(profile), *_beside(profile)]


def _machine(profile: Profile) -> Iterator[str]:
    software = ", ".join(f"{name} {value}" for name, value in profile.software.items())
    yield f"{profile.device}, {software}, {profile.date}"
    peaks = ", ".join(f"{name} {_flops(peak)}" for name, peak in profile.peak.items())
    yield f"fastest product: {peaks}; memory {_bytes(profile.bandwidth)}/s; a launch {1e6 * profile.launch:.1f} us"


def _kernels(profile: Profile, details: bool) -> Iterator[str]:
    yield f"{'kernel':<16} {'pass':<9} {'':<5} {'shape, or bytes':<22} {'ms':>10} {'±':>5} {'rate':>14}"
    kinds: dict[tuple[str, str, str], list[Measured]] = defaultdict(list)
    for each in profile.table:
        kinds[each.kind, each.phase or "both", each.precision or ""].append(each)
    for (kind, phase, precision), found in kinds.items():
        ordered = sorted(found, key=lambda each: each.share)
        for each in found if details else dict.fromkeys((ordered[0], ordered[-1])):
            by_flops = kind in BY_FLOPS
            shape = " x ".join(map(str, each.shape)) if by_flops else _bytes(each.shape[0])
            peak = profile.peak[each.precision] if by_flops and each.precision else profile.bandwidth
            rate = _flops(each.share * peak) if by_flops else f"{_bytes(each.share * peak)}/s"
            spread = f"{each.spread:.0%}" if each.spread is not None else ""
            ms = "" if each.ms is None else f"{each.ms:.3f}"
            yield f"{kind:<16} {phase:<9} {precision:<5} {shape:<22} {ms:>10} {spread:>5} {rate:>14}"


def _sent(profile: Profile) -> Iterator[str]:
    curves = [*profile.collectives, *profile.other_methods]
    if not curves:
        yield "one rank: nothing is sent, so there are no times of collectives"
        return
    for ranks, nodes in sorted({(each.ranks, each.nodes) for each in curves}):
        here = [each for each in curves if (each.ranks, each.nodes) == (ranks, nodes)]
        yield from _group(f"{ranks} ranks on {nodes} node{'s' * (nodes > 1)}, ms", here, profile.other_methods)
    if profile.counts is not None:
        yield f"exchange of row counts, until the host has them: {1e3 * profile.counts:.3f} ms"


def _group(title: str, curves: Sequence[CollectiveTimes], others: Sequence[CollectiveTimes]) -> Iterator[str]:
    sizes = sorted({size for each in curves for size, _ in each.ms})
    yield f"{title:<28}" + "".join(f"{_bytes(size):>10}" for size in sizes)
    for each in curves:
        times = dict(each.ms)
        name = f"{each.collective}{f' ({each.method})' * bool(each.method)}{' -' * (each in others)}"
        yield f"{name:<28}" + "".join(f"{times[size]:>10.2f}" if size in times else f"{'':>10}" for size in sizes)


def _beside(profile: Profile) -> Iterator[str]:
    if profile.slowed_by is None:
        return
    yield f"computation beside a running all-to-all takes {profile.slowed_by:.2f} times as long"
    for each in profile.slowdowns:
        yield (
            f"  {each.method}, {each.ranks} ranks on {each.nodes} node{'s' * (each.nodes > 1)}, "
            f"{_bytes(each.bytes)}: {each.factor:.2f} times (± {each.spread:.0%})"
        )


def _flops(rate: float) -> str:
    return f"{rate / 1e12:.1f} TFLOP/s" if rate >= 1e12 else f"{rate / 1e9:.1f} GFLOP/s"


def _bytes(number: float) -> str:
    unit = min(4, max(0, math.floor(math.log10(max(number, 1)) / 3)))
    return f"{number / 1000**unit:.3g} {('B', 'KB', 'MB', 'GB', 'TB')[unit]}"

"""Work to times: every operator's kernels and every transfer's bytes become milliseconds.

Gradients are averaged as DeepSpeed does it: ZeRO-0 to 2 by an all-reduce (of ZeRO-1 and 2 each rank keeps its part;
`use_multi_rank_bucket_allreduce`), ZeRO-3 by a reduce-scatter; dense ones over the data-parallel group, experts' over
the expert-data-parallel one. All tensors of a pair are taken as one bucket.
"""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Sequence

from scmoe_ds.planner.times import ChunkTimes, LateTimes, OperatorTime, OperatorTimes, PassTimes
from scmoe_ds.simulate.collectives import all_to_all_ms, counts_ms, reduce_ms
from scmoe_ds.simulate.kernels import Phase, bytes_per_number, kernel_ms
from scmoe_ds.simulate.layout import Layout
from scmoe_ds.simulate.machine import Machine
from scmoe_ds.simulate.places import places_of
from scmoe_ds.simulate.routing import EVEN, Loads, Routing
from scmoe_ds.simulate.times import PairTimes, StepTimes
from scmoe_ds.simulate.work import Collective, Kernel, PairWork, Parameters, Part, Reduced, StepWork, Work

_CHUNKS = (1, 2, 4, 8)
_UPDATE_NUMBERS = 8
"""Of fp32, that Adam reads or writes per parameter: gradient, weight and two moments are read, the last three written;
the norm of the gradients reads them once more."""


def price(work: StepWork, layout: Layout, machine: Machine, routing: Routing) -> StepTimes:
    """All times of a step.

    Raises:
        ClusterError: the GPUs have no products of the layout's precision.
        ArgumentError: expert counts of another number of experts.
    """
    prices = _Prices(layout, machine)
    pairs, layer = list[PairTimes](), 0
    for pair in work.pairs:
        pairs.append(prices.pair(pair, _loads(pair, layout, machine, routing, range(layer, layer + pair.count))))
        layer += pair.count
    parameters = work.outside
    for pair in work.pairs:
        parameters = Parameters(
            parameters.dense + pair.count * pair.parameters.dense,
            parameters.experts + pair.count * pair.parameters.experts,
        )
    return StepTimes(
        pairs=tuple(pairs),
        shares=_loads(work.pairs[0], layout, machine, routing, range(1)).shares if work.pairs else (1.0,),
        first=prices.operator(work.first),
        last=prices.operator(work.last),
        outside_reduce_ms=prices.reduce_ms(work.outside),
        outside_gather_ms=prices.gather_ms(work.outside) if layout.zero_stage == 3 else 0.0,
        optimizer_ms=prices.optimizer_ms(parameters),
        update_gather_ms=prices.gather_ms(parameters) if layout.training and layout.zero_stage in (1, 2) else 0.0,
        slowed_by=machine.slowed_by,
        parts=dict(prices.parts),
    )


def _loads(pair: PairWork, layout: Layout, machine: Machine, routing: Routing, layers: range) -> Loads:
    if pair.exchange is None:
        return EVEN
    places = places_of("ep", layout, machine.cluster.gpus_per_node)
    loads = routing.loads(pair.exchange.rows, places.ranks, places.per_node, pair.num_experts, layers)
    # Padding computes and sends the capacity of every expert, whatever its load: classes without a difference.
    return Loads(loads.shares, (1.0,) * len(loads.shares)) if pair.exchange.padded else loads


class _Prices:
    """Prices of one machine and layout; notes what bounds them in `parts`, milliseconds of a micro-batch."""

    def __init__(self, layout: Layout, machine: Machine) -> None:
        self.layout, self.machine = layout, machine
        self.parts: dict[str, float] = defaultdict(float)

    def operator(self, work: Work, times: int = 1, noted: bool = True) -> PassTimes:
        """Forward and backward; with recomputation the backward pass runs the forward pass again.

        Args:
            times: how often the step has the operator, for `parts`.
        """
        notes = times if noted else 0
        forward = self._parts_ms(work.forward, "forward", notes)
        if not self.layout.training:
            return PassTimes(forward_ms=forward)
        backward = self._parts_ms(work.backward, "backward", notes)
        if self.layout.recompute:
            backward += self._parts_ms(work.forward, "forward", notes)
        return PassTimes(forward_ms=forward, backward_ms=backward)

    def _parts_ms(self, parts: Sequence[Part], phase: Phase, times: int) -> float:
        total = 0.0
        for part in parts:
            if isinstance(part, Reduced):
                ms, bound = reduce_ms(part.collective, part.bytes, part.group, self.layout, self.machine)
                self.parts[bound] += times * ms
            else:
                ms, limit = kernel_ms(part, self.machine, self.layout.precision, phase)
                self.parts[limit] += times * ms
            total += ms
        return total

    def pair(self, pair: PairWork, loads: Loads) -> PairTimes:
        """A pair, and its classes of ranks."""
        parts = [self.operator(each, pair.count) for each in pair.before]
        gate, decode = self.operator(pair.gate, pair.count), self.operator(pair.decode, pair.count)
        encode = self._encode(pair)
        backbone = tuple(self._named(each, pair.count) for each in pair.backbone)
        late = None
        if pair.late:
            by_name = {each.name: each for each in backbone}
            late = LateTimes(
                operators=tuple(by_name[name] for name in pair.late), after_dispatch=pair.late_after_dispatch
            )
        transfers = self._transfers(pair, loads)
        by_class = tuple(
            OperatorTimes(
                gate=gate,
                encode=encode,
                decode=decode,
                backbone=backbone,
                chunks={
                    count: ChunkTimes(
                        dispatch=transfer,
                        experts=self._experts(pair, factor, count, noted=count == 1 and number == 0),
                        combine=transfer,
                    )
                    for count, transfer in transfers.items()
                },
                late=late,
            )
            for number, factor in enumerate(loads.factors)
        )
        return PairTimes(
            count=pair.count,
            before=_sum(parts),
            by_class=by_class,
            reduce_ms=self.reduce_ms(pair.parameters),
            gather_ms=self.gather_ms(pair.parameters) if self.layout.zero_stage == 3 else 0.0,
            overlapped=pair.method.overlap,
        )

    def _named(self, work: Work, times: int) -> OperatorTime:
        return OperatorTime(name=work.name, **dict(self.operator(work, times)))

    def _encode(self, pair: PairWork) -> PassTimes:
        """With the exchange of row counts; the backward pass knows them."""
        times = self.operator(pair.encode, pair.count)
        if pair.exchange is None:
            return times
        counts = counts_ms(pair.exchange, self.layout, self.machine)
        self.parts["link"] += pair.count * counts
        return PassTimes(forward_ms=times.forward_ms + counts, backward_ms=times.backward_ms)

    def _experts(self, pair: PairWork, factor: float, chunks: int, noted: bool) -> PassTimes:
        number = bytes_per_number(self.layout.precision)
        work = Work(
            pair.experts.name,
            tuple(_scaled(part, factor / chunks, number) for part in pair.experts.forward),
            tuple(_scaled(part, factor / chunks, number) for part in pair.experts.backward),
        )
        return self.operator(work, pair.count, noted)

    def _transfers(self, pair: PairWork, loads: Loads) -> dict[int, PassTimes]:
        """Of a dispatch or a combine, by number of chunks. A gradient has as many bytes as what it belongs to."""
        counts = [count for count in _CHUNKS if count <= pair.method.most_chunks]
        if pair.exchange is None:
            return {1: PassTimes(forward_ms=0.0)}
        passes, by_count = 1 + bool(self.layout.recompute), {}
        for count in counts:
            ms, bound = all_to_all_ms(pair.exchange, self.layout, self.machine, pair.num_experts, loads, count)
            if count == 1:
                self.parts[bound] += 2 * pair.count * ms * (1 + passes if self.layout.training else 1)
            by_count[count] = PassTimes(forward_ms=ms, backward_ms=passes * ms if self.layout.training else 0.0)
        return by_count

    def reduce_ms(self, parameters: Parameters) -> float:
        """Of their gradients."""
        if not self.layout.training:
            return 0.0
        return self._over_groups("reduce-scatter" if self.layout.zero_stage == 3 else "all-reduce", parameters)

    def gather_ms(self, parameters: Parameters) -> float:
        """Of all parameters that the ranks of a group share, each a part."""
        return self._over_groups("all-gather", parameters)

    def _over_groups(self, collective: Collective, parameters: Parameters) -> float:
        number = bytes_per_number(self.layout.precision)
        dense = reduce_ms(collective, parameters.dense * number, "dp", self.layout, self.machine)
        experts = reduce_ms(collective, parameters.experts * number, "edp", self.layout, self.machine)
        return dense[0] + experts[0]

    def optimizer_ms(self, parameters: Parameters) -> float:
        """Adam, by the bytes that it moves; with ZeRO each rank updates its part."""
        if not self.layout.training:
            return 0.0
        sharded = self.layout.zero_stage > 0
        own = parameters.dense / (self.layout.data_parallel if sharded else 1)
        own += parameters.experts / (self.layout.expert_data_parallel if sharded else 1)
        numbers = 4 * _UPDATE_NUMBERS
        if self.layout.precision != "fp32":  # the gradients become fp32, the weights 16 bits wide again
            numbers += (2 + 4) + 2
        kernel = Kernel("pointwise", bytes=own * numbers)
        return kernel_ms(kernel, self.machine, self.layout.precision)[0]


def _sum(times: Sequence[PassTimes]) -> PassTimes:
    return PassTimes(
        forward_ms=math.fsum(each.forward_ms for each in times),
        backward_ms=math.fsum(each.backward_ms for each in times),
    )


def _scaled(part: Part, factor: float, number: int) -> Part:
    """A kernel of the experts on another number of rows. Their weights are read, or their gradients written, as before.

    Args:
        factor: of the rows.
        number: bytes of one.
    """
    if isinstance(part, Reduced):
        return dataclasses.replace(part, bytes=part.bytes * factor)
    fixed, shape = 0.0, part.shape
    if shape is not None and part.kind in ("product", "grouped product"):
        tokens = shape[part.tokens]
        products = part.flops / (2 * math.prod(shape))
        fixed = min(part.bytes, products * math.prod(shape) / tokens * number)
        shape = (max(1, round(shape[0] * factor)), *shape[1:]) if part.tokens == 0 else shape
        shape = (shape[0], max(1, round(shape[1] * factor)), shape[2]) if part.tokens == 1 else shape
    return dataclasses.replace(
        part, flops=part.flops * factor, bytes=fixed + (part.bytes - fixed) * factor, shape=shape
    )

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
from scmoe_ds.simulate.kernels import Kernels, Phase, bytes_per_number
from scmoe_ds.simulate.layout import Layout
from scmoe_ds.simulate.machine import Machine
from scmoe_ds.simulate.places import places_of
from scmoe_ds.simulate.routing import EVEN, Loads, Routing
from scmoe_ds.simulate.times import PairTimes, StepTimes
from scmoe_ds.simulate.work import Collective, Group, Kernel, PairWork, Parameters, Part, Reduced, StepWork, Work

_CHUNKS = (1, 2, 4, 8)


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
    groups: tuple[Group, ...] = ("ep", "dp")
    spans = {group: places_of(group, layout, machine.cluster.gpus_per_node).nodes for group in groups}
    return StepTimes(
        pairs=tuple(pairs),
        shares=_loads(work.pairs[0], layout, machine, routing, range(1)).shares if work.pairs else (1.0,),
        first=prices.with_sums(prices.operator(work.first), work.outside),
        last=prices.operator(work.last),
        outside_reduce_ms=prices.reduce_ms(work.outside),
        outside_gather_ms=prices.gather_ms(work.outside) if layout.zero_stage == 3 else 0.0,
        optimizer_ms=prices.optimizer_ms(parameters),
        update_gather_ms=prices.gather_ms(parameters) if layout.training and layout.zero_stage in (1, 2) else 0.0,
        slowed_by=machine.slowed_by,
        shared_link=spans["ep"] > 1 or spans["dp"] == 1,
        in_flight=work.pairs[0].method.in_flight if work.pairs else 1,
        parts=dict(prices.parts),
    )


def _loads(pair: PairWork, layout: Layout, machine: Machine, routing: Routing, layers: range) -> Loads:
    if pair.exchange is None:
        return EVEN
    places = places_of("ep", layout, machine.cluster.gpus_per_node)
    group = places.ranks, places.per_node
    loads = routing.loads(pair.exchange.rows, *group, pair.num_experts, layers, pair.method.parts)
    # Padding computes and sends the capacity of every expert, whatever its load: classes without a difference.
    return Loads(loads.shares, (1.0,) * len(loads.shares)) if pair.exchange.padded else loads


class _Prices:
    """Prices of one machine and layout; notes what bounds them in `parts`, milliseconds of a micro-batch."""

    def __init__(self, layout: Layout, machine: Machine) -> None:
        self.layout, self.machine = layout, machine
        self.kernels = Kernels(machine.cluster.gpu, layout.precision)
        self.parts: dict[str, float] = defaultdict(float)

    def operator(self, work: Work, times: int = 1, repeated: bool = False) -> PassTimes:
        """Forward and backward.

        Args:
            times: how often a micro-batch has it, for `parts`.
            repeated: whether it runs its forward pass twice, also for `parts`.
        """
        forward = self._parts_ms(work.forward, "forward", times * (1 + repeated))
        backward = self._parts_ms(work.backward if self.layout.training else (), "backward", times)
        return PassTimes(forward_ms=forward, backward_ms=backward)

    def _parts_ms(self, parts: Sequence[Part], phase: Phase, times: int) -> float:
        total = 0.0
        for part in parts:
            if isinstance(part, Reduced):
                ms, bound = reduce_ms(part.collective, part.bytes, part.group, self.layout, self.machine)
                self.parts[bound] += times * ms
            else:
                ms, limit = self.kernels.ms(part, phase)
                self.parts[limit] += times * ms
            total += ms
        return total

    def pair(self, pair: PairWork, loads: Loads) -> PairTimes:
        """A pair, and its classes of ranks."""
        before, backbone = self._named(pair.before, pair), self._named(pair.backbone, pair)
        by_name = {each.name: each for each in (*before, *backbone)}
        late = tuple(by_name[name] for name in pair.late)
        busiest = OperatorTimes(
            gate=self.operator(pair.gate, pair.count, pair.repeated),
            encode=self._encode(pair),
            decode=self.operator(pair.decode, pair.count, pair.repeated),
            backbone=backbone,
            chunks=self._chunks(pair, loads, loads.factors[0], noted=True),
            late=LateTimes(operators=late, after_dispatch=pair.late_after_dispatch) if late else None,
        )
        others = [busiest.model_copy(update={"chunks": self._chunks(pair, loads, each)}) for each in loads.factors[1:]]
        return PairTimes(
            count=pair.count,
            before=self.with_sums(_sum(before), pair.parameters, pair.count),
            by_class=(busiest, *others),
            reduce_ms=self.reduce_ms(pair.parameters),
            gather_ms=self.gather_ms(pair.parameters) if self.layout.zero_stage == 3 else 0.0,
            overlapped=pair.method.overlap,
            repeated=pair.repeated,
        )

    def _named(self, works: Sequence[Work], pair: PairWork) -> tuple[OperatorTime, ...]:
        return tuple(
            OperatorTime(name=each.name, **dict(self.operator(each, pair.count, pair.repeated))) for each in works
        )

    def _encode(self, pair: PairWork) -> PassTimes:
        """With the exchange of row counts; the backward pass knows them."""
        times = self.operator(pair.encode, pair.count, pair.repeated)
        if pair.exchange is None:
            return times
        counts = counts_ms(pair.exchange, self.layout, self.machine)
        self.parts["link"] += pair.count * (1 + pair.repeated) * counts
        return PassTimes(forward_ms=times.forward_ms + counts, backward_ms=times.backward_ms)

    def _chunks(self, pair: PairWork, loads: Loads, factor: float, noted: bool = False) -> dict[int, ChunkTimes]:
        """Every number of chunks that the method may have; `parts` has one chunk, of the busiest ranks."""
        counts = [count for count in _CHUNKS if count <= pair.method.most_chunks] if pair.exchange else [1]
        chunks = {}
        for count in counts:
            times = pair.count if count == 1 and noted else 0
            dispatch, combine = self._transfers(pair, loads, count, times)
            experts = self.operator(self._experts(pair, factor, count), times, pair.repeated)
            chunks[count] = ChunkTimes(dispatch=dispatch, experts=experts, combine=combine)
        return chunks

    def _experts(self, pair: PairWork, factor: float, chunks: int) -> Work:
        """One of several chunks."""
        number = bytes_per_number(self.layout.precision)
        forward, backward = (
            tuple(_scaled(part, factor / chunks, number) for part in parts)
            for parts in (pair.experts.forward, pair.experts.backward)
        )
        sums = [_added(part, chunks, number) for part in pair.experts.backward]
        return Work(pair.experts.name, forward, (*backward, *(each for each in sums if each is not None)))

    def _transfers(self, pair: PairWork, loads: Loads, chunks: int, times: int) -> tuple[PassTimes, PassTimes]:
        """Dispatch and combine. The gradient of one has as many bytes as its forward pass the other way has."""
        exchange = pair.exchange
        if exchange is None:
            return PassTimes(forward_ms=0.0), PassTimes(forward_ms=0.0)
        back = dataclasses.replace(exchange, rows=exchange.combine_rows) if exchange.combine_rows else exchange
        (out_ms, bound), (back_ms, _) = (
            all_to_all_ms(each, self.layout, self.machine, pair.num_experts, loads, chunks) for each in (exchange, back)
        )
        again = pair.repeated + self.layout.training
        self.parts[bound] += times * (out_ms + back_ms) * (1 + again)
        if not self.layout.training:
            return PassTimes(forward_ms=out_ms), PassTimes(forward_ms=back_ms)
        return PassTimes(forward_ms=out_ms, backward_ms=back_ms), PassTimes(forward_ms=back_ms, backward_ms=out_ms)

    def with_sums(self, times: PassTimes, parameters: Parameters, count: int = 1) -> PassTimes:
        """With the sums of gradients over micro-batches: all but the first one read both, and write the sum."""
        steps = self.layout.accumulation
        if not self.layout.training or steps == 1:
            return times
        numbers = 3 * (parameters.dense + parameters.experts) * (steps - 1) / steps
        kernel = Kernel("pointwise", bytes=numbers * bytes_per_number(self.layout.precision))
        ms, limit = self.kernels.ms(kernel, "backward")
        self.parts[limit] += count * ms
        return PassTimes(forward_ms=times.forward_ms, backward_ms=times.backward_ms + ms)

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
        # Weight, gradient and states are read, all but the gradient written; the gradients' norm reads them once more.
        numbers = 4.0 * (4 + 2 * self.layout.states)
        if self.layout.precision != "fp32":  # the gradients become fp32, the weights 16 bits wide again
            numbers += (2 + 4) + 2
        kernel = Kernel("optimizer", bytes=own * numbers)
        return self.kernels.ms(kernel, "forward")[0]


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
    if part.tokens is None:
        return part
    fixed, shape = 0.0, part.shape
    if shape is not None and part.kind in ("product", "grouped product"):
        tokens = max(1, shape[part.tokens])
        fixed = min(part.bytes, part.flops / (2 * tokens) * number)
        scaled = max(1, round(tokens * factor))
        shape = (scaled, *shape[1:]) if part.tokens == 0 else (shape[0], scaled, shape[2])
    return dataclasses.replace(
        part, flops=part.flops * factor, bytes=fixed + (part.bytes - fixed) * factor, shape=shape
    )


def _added(part: Part, chunks: int, number: int) -> Kernel | None:
    """What a chunk adds to the gradient of a weight, on average: all but the first one read both, and write the sum."""
    if isinstance(part, Reduced) or part.shape is None or part.tokens != 1 or chunks == 1:
        return None
    weights = part.flops / (2 * part.shape[1])
    return Kernel("pointwise", bytes=3 * number * weights * (chunks - 1) / chunks, launches=part.launches)

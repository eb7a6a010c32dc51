"""Overloaded ranks compute their experts in low precision, if most of their rows tolerate it (ReaLB, arXiv 2604.19503).

Every rank tells the others four numbers beside its row counts. From them each rank decides for itself whether it is
hot in this layer and pass. A hot rank converts the weights of its experts as soon as it knows, and forgets them after
use: the weights stay as they are. With a shortcut, the decision and the conversion lie inside the window.

Shape suffixes: T tokens, D hidden, K choices of a token, L local experts, P ranks of the exchange, R
expert-parallel ranks, S rows received, X numbers of a notice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
from deepspeed.moe.experts import Experts
from torch import Tensor, nn

from scmoe_ds.comm.side_stream import side_stream
from scmoe_ds.moe.decisions.dropping import criterion
from scmoe_ds.moe.decisions.low_precision_expert import Expert, of_two_projections
from scmoe_ds.moe.decisions.low_precision_formats import Format, Scaled
from scmoe_ds.moe.experts import OwnExperts, TwoProjections, run_experts
from scmoe_ds.moe.gate import Routing
from scmoe_ds.moe.slices import TokenSlices

NOTICES = 4
ROWS_AT_ONCE = 256
"""On a CPU: so many rows' activations stay in its second-level cache between the products."""


@dataclass(frozen=True)
class LowPrecision:
    """When ranks compute their routed experts in low precision.

    Attributes:
        ranks: "hot": ranks that are overloaded, and most of whose rows tolerate it; "all": every rank, to compare.
        score: a row tolerates it if its criterion (`dropping.criterion`, from the gate's scores) is lower, in (0, 1].
            None: rows of tokens that the caller marks with `gate.TOLERANT` tolerate it.
        share: a hot rank has at least this share of tolerant rows. M_d of the paper, which recommends 0.7.
        overload: a hot rank has more rows than the mean of all ranks times this. It is slightly above 1: a rank that is
            hardly overloaded would lose precision and win nothing.
        min_tokens: all ranks compute as usual unless the batch of all of them has more tokens (paper: 2048).
        format: "int8" or "fp8"; None: the best that the device has.

    Raises:
        ValueError: a setting out of its range.
    """

    ranks: Literal["hot", "all"] = "hot"
    score: float | None = 0.7
    share: float = 0.7
    overload: float = 1.05
    min_tokens: int = 2048
    format: str | None = None

    def __post_init__(self) -> None:
        rules = {
            "ranks": (self.ranks in ("hot", "all"), 'must be "hot" or "all"'),
            "score": (self.score is None or 0 < self.score <= 1, "must be above 0 and at most 1"),
            "share": (0 <= self.share <= 1, "must be between 0 and 1"),
            "overload": (self.overload >= 1, "must be at least 1, the mean load"),
            "min_tokens": (self.min_tokens >= 0, "must not be negative"),
        }
        for name, (holds, rule) in rules.items():
            if not holds:
                raise ValueError(f"{name} = {getattr(self, name)}: {rule}")

    def tolerant(self, routing: Routing) -> Tensor | None:
        """bool [K, T] or [1, T], the choices that tolerate low precision; None: no choice does."""
        if self.score is None:
            return None if routing.tolerant_T is None else routing.tolerant_T.unsqueeze(0)
        return criterion(routing) < self.score


@dataclass
class Counts:
    """Of one layer on this rank: passes, and those in which this rank was hot."""

    passes: int = 0
    hot: int = 0


class LowPrecisionExperts(OwnExperts):
    """Takes the place of a layer's experts: in low precision while this rank is hot, otherwise as before.

    Args:
        experts: each local expert.
        usual: computes rows as before; arguments and result are those of `run_experts`.
        slices: of the layer.
        settings: when this rank is hot.
        format: of a hot rank's products.

    Attributes:
        hot: whether this rank is hot in the current pass.
        counts: passes since the experts were made.
    """

    def __init__(
        self,
        experts: Sequence[Expert],
        usual: Callable[[Tensor, Sequence[int]], Tensor],
        slices: TokenSlices,
        settings: LowPrecision,
        format: Format,
    ) -> None:
        self.experts, self.usual, self.slices = experts, usual, slices
        self.settings, self.format = settings, format
        self.num_local_experts, self.notices = len(experts), NOTICES
        self.hot, self.counts = False, Counts()
        self._converted: dict[int, list[Scaled]] = {}
        self._done: torch.cuda.Event | None = None
        self._runs = 0  # calls of `run` that were announced and are still to come: one for each chunk

    def notice(self, routing: Routing, ranks: int) -> Tensor:
        """[P, 4] int64, for each rank: this rank's tokens, its rows for all ranks, its rows for that rank, and how many
        of the last tolerate low precision."""
        rows_E, expert_KT = routing.choices.rows_E, routing.choices.expert_KT
        tolerant, tolerant_E = self.settings.tolerant(routing), torch.zeros_like(rows_E)
        if tolerant is not None:
            kept_KT = tolerant.expand_as(expert_KT)
            if routing.choices.kept_KT is not None:
                kept_KT = kept_KT & routing.choices.kept_KT
            # A masked token's expert may be any number; it is not kept, and adds 0 to whatever expert.
            tolerant_E.scatter_add_(0, expert_KT.clamp(0, len(rows_E) - 1).flatten(), kept_KT.flatten().long())
        of_ranks = self.slices.expert_parallel_size
        rows_R, tolerant_R = torch.stack([rows_E, tolerant_E]).view(2, of_ranks, -1).sum(2)
        used_T, tokens = routing.used_T, expert_KT.shape[1]
        tokens_1 = rows_R.new_full((1,), tokens) if used_T is None else used_T.sum().view(1)
        own = [each.expand(of_ranks) for each in (tokens_1, rows_R.sum().view(1))]
        notice_R4 = torch.stack([*own, rows_R, tolerant_R], dim=1)
        return notice_R4 if ranks == of_ranks else notice_R4.repeat(ranks // of_ranks, 1)

    def told(self, told_PX: Tensor) -> None:
        """Decides whether this rank is hot. No rank is where gradients are computed: the products have none."""
        tokens, rows, own, tolerant = told_PX.sum(0).tolist()
        self._forget()
        if torch.is_grad_enabled():
            self.forget_scales()  # the weights may be about to change
        self.hot = not torch.is_grad_enabled() and self._decide(tokens, rows, own, tolerant)
        self.counts.passes += 1
        self.counts.hot += self.hot

    def forget_scales(self) -> None:
        """See `Expert`."""
        for expert in self.experts:
            expert.forget_scales()

    def _decide(self, tokens: int, rows: int, own: int, tolerant: int) -> bool:
        """The conditions of `LowPrecision`, on sums over the ranks of the exchange. Tensor-parallel ranks hold the same
        tokens, which are counted once for each of them."""
        settings = self.settings
        if tokens <= settings.min_tokens * self.slices.tensor_parallel_size or not own:
            return False
        overloaded = own * self.slices.expert_parallel_size > settings.overload * rows
        return settings.ranks == "all" or (overloaded and tolerant >= settings.share * own)

    def announce(self, rows_per_expert: Sequence[int]) -> None:
        """Converts the weights of experts with rows, on a GPU beside everything else."""
        if not self.hot:
            return
        self._runs += 1
        needed = [expert for expert, rows in enumerate(rows_per_expert) if rows and expert not in self._converted]
        device = self.experts[0].output.weight.device
        if device.type != "cuda":
            self._convert(needed)
            return
        with torch.cuda.stream(side_stream(device)):
            self._convert(needed)
            self._done = torch.cuda.Event()
            self._done.record()

    def _convert(self, experts: Sequence[int]) -> None:
        for number in experts:
            self._converted[number] = self.experts[number].convert(self.format)

    def run(self, rows_SD: Tensor, rows_per_expert: Sequence[int]) -> Tensor:
        """[S, D] → [S, D]: each local expert on its own rows."""
        if not self.hot:
            return self.usual(rows_SD, rows_per_expert)
        if self._done is not None:
            stream = torch.cuda.current_stream(rows_SD.device)
            self._wait(stream, self._done)
            for each in (each for weights in self._converted.values() for each in weights):
                each.record_stream(stream)
        output_SD = torch.empty_like(rows_SD)
        parts = zip(rows_SD.split(list(rows_per_expert)), output_SD.split(list(rows_per_expert)), strict=True)
        for expert, (rows, output) in enumerate(parts):
            self._compute(expert, rows, output)
        self._runs -= 1
        if not self._runs:
            self._forget()
        return output_SD

    def _wait(self, stream: torch.cuda.Stream, done: torch.cuda.Event) -> None:
        """Orders the computation behind the conversion, which ran beside it."""
        stream.wait_event(done)

    def _compute(self, number: int, rows_SD: Tensor, output_SD: Tensor) -> None:
        expert, rows = self.experts[number], len(rows_SD)
        if rows_SD.is_cuda and rows < self.format.least_rows:
            if rows:
                output_SD.copy_(expert.compute(rows_SD))
            return
        at_once = rows if rows_SD.is_cuda else ROWS_AT_ONCE
        for part, output in zip(rows_SD.split(at_once), output_SD.split(at_once), strict=True):
            if rows:
                output.copy_(expert.compute_in(self.format, self._converted[number], part))

    def _forget(self) -> None:
        self._converted, self._done, self._runs = {}, None, 0


class LowPrecisionContainer(nn.Module, LowPrecisionExperts):
    """In the place of DeepSpeed's container, with the parameters under the same names."""

    num_local_experts: int

    def __init__(self, container: Experts, slices: TokenSlices, settings: LowPrecision, format: Format) -> None:
        nn.Module.__init__(self)
        members = [of_two_projections(cast(TwoProjections, each)) for each in container.deepspeed_experts]

        def usual(rows_SD: Tensor, rows_per_expert: Sequence[int]) -> Tensor:
            return run_experts(container, rows_SD, rows_per_expert)

        LowPrecisionExperts.__init__(self, members, usual, slices, settings, format)
        self.deepspeed_experts = container.deepspeed_experts

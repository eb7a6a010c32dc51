"""What one rank computes and sends in a training step: the numbers that times are made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Union

from scmoe_ds.simulate.method import Method

Kind = Literal[
    "product",
    "grouped product",
    "attention",
    "pointwise",
    "activation",
    "gated activation",
    "reduction",
    "rows",
    "optimizer",
]
"""product: a matrix product. grouped product: one per local expert in a launch. attention: scores, softmax and values.
pointwise: additions, copies, casts, masks. activation: GELU. gated activation: SwiGLU. reduction: norms, softmax,
cumulative sums. rows: rows gathered or scattered by index. optimizer: Adam's update."""
LIKE: dict[str, str] = {
    "grouped product": "product",
    "gated activation": "activation",
    **dict.fromkeys(("activation", "reduction", "rows", "optimizer"), "pointwise"),
}
"""Whose efficiency a kind takes that a GPU's description has none of."""
Group = Literal["tp", "dp", "ep", "edp"]
Collective = Literal["all-reduce", "reduce-scatter", "all-gather"]


@dataclass(frozen=True)
class Kernel:
    """One or several alike launches.

    Attributes:
        flops: floating-point operations, of all launches; a multiplication and an addition are two.
        bytes: read from and written to memory, of all launches.
        shape: rows, inner and columns of a product (of one of the group); tokens that a token attends to, size of a
            head, and heads of all sequences or windows of an attention. Efficiency is measured by it.
        launches: how many.
        tokens: which number of a product's shape counts tokens: 0, its rows, or 1, the inner one of a weight's
            gradient. It shrinks with a chunk and grows with a rank's load; the matrix of the other two stays as it is.
            None: of a kernel that any number of tokens needs as it is.
    """

    kind: Kind
    flops: float = 0.0
    bytes: float = 0.0
    shape: tuple[int, int, int] | None = None
    launches: int = 1
    tokens: Literal[0, 1] | None = 0


@dataclass(frozen=True)
class Reduced:
    """A collective that the computation waits for inside an operator, such as tensor parallelism's all-reduce.

    Attributes:
        bytes: of the whole tensor on one rank, before a reduce-scatter or after an all-gather.
    """

    collective: Collective
    group: Group
    bytes: float


Part = Union[Kernel, Reduced]


@dataclass(frozen=True)
class Work:
    """An operator on one rank.

    Attributes:
        name: a label of the planner's: "attention 2", "attention before tap", "mlp", "shared", "experts".
        forward, backward: in their order.
        kept: bytes that the forward pass keeps for the backward pass.
    """

    name: str
    forward: tuple[Part, ...] = ()
    backward: tuple[Part, ...] = ()
    kept: float = 0.0


@dataclass(frozen=True)
class Exchange:
    """The all-to-all of an MoE layer over its expert-parallel group; dispatch and combine carry the same.

    Attributes:
        rows: that a rank sends, its own experts' rows among them: tokens × routed experts, or the capacity of all
            experts with a padded dispatch. One copy per choice; `collectives.py` takes the doubles out.
        choices: experts per token.
        row_bytes: of one row.
        padded: whether every rank sends every other the same, however uneven the routing.
        count_bytes: of the exchange of row counts ahead, which nothing hides; 0: none.
        combine_rows: that this rank gets with the combine, where these are more than `rows`: whole experts under tensor
            parallelism, whose ranks send slices and get all results; 0: as many as `rows`. Backward the dispatch has
            them.
        parts: of an expert, each with a copy of the row; 1 where `rows` are to be sent one by one.
    """

    rows: float
    choices: int
    row_bytes: float
    padded: bool
    count_bytes: float = 0.0
    combine_rows: float = 0.0
    parts: int = 1


@dataclass(frozen=True)
class Parameters:
    """How many a rank holds before ZeRO: dense ones, shared by its data-parallel group, and its experts'."""

    dense: float = 0.0
    experts: float = 0.0


@dataclass(frozen=True)
class PairWork:
    """A run of blocks that ends in one with an MoE.

    Attributes:
        count: like pairs in a row.
        before: operators before the tap, in forward order; blocks without an MoE that precede the pair's among them.
        gate, encode, decode: of the MoE; decode is the permutation back, the weighting and the merge.
        backbone: operators between tap and join; empty for "topk". A shared expert is the operator "shared".
        experts: of a rank with the mean load.
        exchange: None: nothing travels, EP is 1.
        late: with a late join, labels of the backbone's operators of the next pair that come before it, as in
            `planner.times.LateWindow`.
        late_after_dispatch: whether the next pair's dispatch leaves before them.
        parameters: of one such pair.
        num_experts: routed experts of the layer, of all ranks.
        repeated: whether the backward pass begins with another forward pass of the whole pair, communication included.
    """

    method: Method
    count: int
    before: tuple[Work, ...]
    gate: Work
    encode: Work
    backbone: tuple[Work, ...]
    experts: Work
    decode: Work
    exchange: Exchange | None
    parameters: Parameters
    num_experts: int
    late: tuple[str, ...] = ()
    late_after_dispatch: bool = False
    repeated: bool = False


@dataclass(frozen=True)
class StepWork:
    """One micro-batch of a rank, and the parameters that a step updates.

    Attributes:
        pairs: in forward order.
        first, last: embeddings before all pairs; final norm, head and loss behind them, and blocks behind the last MoE.
        outside: parameters of `first` and `last`.
        tokens: of one micro-batch on one data-parallel rank.
        flops: that the model needs for a micro-batch and rank, forward and backward, for the MFU: nothing recomputed,
            no padding, no one-hot products; the attention's causal half counted once.
    """

    pairs: tuple[PairWork, ...]
    first: Work
    last: Work
    outside: Parameters
    tokens: float
    flops: float

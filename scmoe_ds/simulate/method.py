"""How a model's MoE layers run: a row of every table of `scmoe plan`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Architecture = Literal["topk", "shared_expert", "scmoe"]
Dispatch = Literal["padded", "exact"]


@dataclass(frozen=True)
class Method:
    """One way to run the MoE layers.

    Attributes:
        name: as tables show it.
        architecture: "topk" is a MoE without a shared expert, unless the model has one of its own; "shared_expert" adds
            one and has one routed expert less; "scmoe" is that with the routed experts at a shortcut.
        layer: whose layer computes it. DeepSpeed's finds the places of tokens with masks over all experts, and gathers
            rows into buffers of the capacity; AutoEP's sorts rows and computes a shared expert behind the combine.
        routed: experts that a token is routed to; None: as many as the model says for "topk", one less with a shared
            expert that this method adds.
        dispatch: "padded" sends and computes the capacity of every expert, "exact" real rows only.
        position, join: of the shortcut; join as in the "scmoe" section.
        overlap: whether communication runs beside computation.
        most_chunks: of the expert computation, which the planner may choose; 1: no pipelining. "auto" of the "scmoe"
            section goes up to 4.
        in_flight: micro-batches on their way at once; 2: a forward pass beside the backward pass of the one before.
        merge: how shared and routed outputs are added, as in the "scmoe" section.
        shortcut_norm: whether the shortcut has a norm of its own.
        post_norm: whether a norm follows the merge.
        shortcut_distance: how many blocks before the MoE's the shortcut is taken.
        shared_hidden: width inside the shared expert that this method adds; 0: as one routed expert.
        adds_shared: False: a model without a shared expert gets none, and keeps its routed experts per token. So
            `scmoe adapt` makes a Hugging Face model a ScMoE, unless it is asked for a shared expert.
        capacity_factor, min_capacity: tokens per expert in a padded dispatch: of an even split, and at least. Without a
            factor that of the paper's models: 2, of images 1.25.
        parts: of a routed expert, each of which gets the rows of the whole one; `expert_partition` of the section. Part
            p of expert e is place e * parts + p, and the places lie on the ranks in order.
        drop_tokens: False: a padded dispatch has as many rows per expert as the busiest one needs.
    """

    name: str
    architecture: Architecture
    layer: Literal["deepspeed", "autoep", "scmoe_ds"] = "scmoe_ds"
    routed: int | None = None
    dispatch: Dispatch = "exact"
    position: Literal["pos1", "pos2", "pos3"] | None = None
    join: Literal["block", "late"] = "block"
    overlap: bool = True
    most_chunks: int = 1
    in_flight: int = 1
    merge: Literal["add", "cg1", "cg2"] = "cg1"
    shortcut_norm: Literal["own", "shared"] = "own"
    post_norm: bool = False
    shortcut_distance: int = 1
    shared_hidden: int = 0
    adds_shared: bool = True
    capacity_factor: float | None = None
    min_capacity: int = 4
    drop_tokens: bool = True
    parts: int = 1


DEEPSPEED_TOPK = Method("DeepSpeed top-k, padded", "topk", "deepspeed", dispatch="padded", overlap=False)
AUTOEP = Method("AutoEP", "topk", "autoep", overlap=False)
PIPELINED = Method("top-k, pipelined", "topk", most_chunks=4)
SHARED = Method("shared expert", "shared_expert", overlap=False)
SHARED_OVERLAPPED = Method("shared expert, overlapped", "shared_expert", most_chunks=4)
SCMOE = tuple(Method(f"ScMoE Pos-{n}", "scmoe", position=f"pos{n}", most_chunks=4) for n in (1, 2, 3))  # type: ignore[arg-type]
SCMOE_LATE = tuple(
    Method(f"ScMoE Pos-{n}, late join", "scmoe", position=f"pos{n}", join="late", most_chunks=4)  # type: ignore[arg-type]
    for n in (1, 2, 3)
)
TWO_IN_FLIGHT = Method("top-k, two micro-batches in flight", "topk", overlap=False, in_flight=2)
"""What others do instead of a shortcut (two_in_flight.py). No run of this package does it: it is no row of a plan."""
METHODS = (DEEPSPEED_TOPK, AUTOEP, PIPELINED, SHARED, SHARED_OVERLAPPED, *SCMOE, *SCMOE_LATE)
"""What `scmoe plan` compares, in this order. The first is the one that the others are compared with."""

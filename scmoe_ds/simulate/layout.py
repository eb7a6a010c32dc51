"""How a training step is spread over the ranks: one point of the search."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Precision = Literal["fp32", "fp16", "bf16"]


@dataclass(frozen=True)
class Layout:
    """Degrees of parallelism and batch sizes.

    Attributes:
        world: ranks, one per GPU; they are numbered node by node.
        expert_parallel: ranks that share the experts of a layer. They are neighbours: ranks 0 … EP - 1 are a group;
            with divided experts every TP-th of ranks 0 … EP·TP - 1.
        tensor_parallel: ranks that share an attention or MLP; neighbours, too.
        zero_stage: 0 … 3.
        micro_batch: samples per data-parallel rank in one forward pass.
        accumulation: micro-batches in a step.
        precision: of weights in use, activations and what travels.
        recompute: what the backward pass computes again. "selective": each dense operator. "full" or True: whole pairs,
            communication included.
        hierarchical: whether rows to other nodes are gathered inside the node first.
        copies: what an exact dispatch of this package sends of a token: one row per rank with a chosen expert, as it
            does, or one per chosen expert. Other layers send one per choice.
        expert_tensor_parallel: whether a routed expert is divided among the tensor-parallel ranks, too. Otherwise each
            of them sends a slice of the tokens that they all hold.
        reduce_bucket, allgather_bucket: elements of DeepSpeed's buffers.
        states: fp32 values that the optimizer keeps of a parameter beside its fp32 weight; Adam has two.
        overlap_comm: whether gradients are reduced beside the backward pass, as DeepSpeed's key of this name says.
            None: its default, with ZeRO-3 alone. Without ZeRO they never are.
        training: False: a forward pass alone, of one micro-batch; no gradients, no optimizer.
    """

    world: int
    expert_parallel: int = 1
    tensor_parallel: int = 1
    zero_stage: int = 1
    micro_batch: int = 1
    accumulation: int = 1
    precision: Precision = "bf16"
    recompute: bool | Literal["selective", "full"] = False
    hierarchical: bool = False
    copies: Literal["choice", "rank"] = "rank"
    expert_tensor_parallel: bool = False
    reduce_bucket: int = 500_000_000
    allgather_bucket: int = 500_000_000
    states: int = 2
    overlap_comm: bool | None = None
    training: bool = True

    @property
    def data_parallel(self) -> int:
        """Ranks that share the dense gradients: world / TP."""
        return self.world // self.tensor_parallel

    @property
    def expert_data_parallel(self) -> int:
        """Ranks that hold the same experts: world / EP, and divided experts the same parts: DP / EP."""
        return self.world // (self.expert_parallel * (self.tensor_parallel if self.expert_tensor_parallel else 1))

    @property
    def reduces_beside(self) -> bool:
        """Whether gradients are reduced beside the backward pass."""
        return self.zero_stage > 0 and (self.zero_stage == 3 if self.overlap_comm is None else self.overlap_comm)

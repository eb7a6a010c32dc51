"""What the host has to know of the data: under the check every expert gets as many choices as every other, and ranks
and values that are compared agree.

Shape suffixes: X choices, N chunks, P ranks, V senders, L local experts.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from deepspeed.moe.sharded_moe import TopKGate
from deepspeed.runtime.zero import stage_1_and_2
from torch import Tensor

from scmoe_ds.check.fakes import Fakes
from scmoe_ds.comm.counts import CountsInFlight
from scmoe_ds.compat import FakeTensor
from scmoe_ds.moe import gate
from scmoe_ds.moe.exchange import one_row_per_rank, row_counts
from scmoe_ds.moe.gate import Routing
from scmoe_ds.moe.routed import RoutedTokens
from scmoe_ds.moe.slices import TokenSlices
from scmoe_ds.replace.tap_check import TapCheck

_agreed, _forward = gate._agreed, TopKGate.forward


@contextmanager
def even_routing(fakes: Fakes) -> Iterator[None]:
    """Inside the block, what layers read of their data is that of an even routing, the same on all ranks."""

    def gated(topk_gate: TopKGate, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        # DeepSpeed's own layers read the capacity, which without drops follows from the counts.
        fakes.capacity = -(-topk_gate.k * len(input) // topk_gate.wg.out_features)
        l_aux, capacity, *rest = _forward(topk_gate, input, *args, **kwargs)
        return l_aux, fakes.capacity if isinstance(capacity, FakeTensor) else capacity, *rest

    with (
        patch.object(RoutedTokens, "counts_on_host", _counts_on_host),
        patch.object(gate, "_agreed", _agreed_on_host),
        patch.object(TopKGate, "forward", gated),
        patch.object(TapCheck, "finish", lambda check, value: check.remove()),
        patch.object(stage_1_and_2, "is_invalid_grad_norm", lambda norm: False, create=True),
    ):
        yield


def _agreed_on_host(routing: Routing, group: dist.ProcessGroup | None) -> Routing:
    """The capacity of padded buffers, a number."""
    K, T = routing.weight_KT.shape
    own = routing.capacity if isinstance(routing.capacity, int) else -(-K * T // routing.exp_counts.shape[0])
    return replace(_agreed(routing, group), capacity=own)


def _counts_on_host(routed: RoutedTokens, counts: CountsInFlight) -> tuple[list[int], list[int]]:
    routing, slices, chunks = routed.routing, routed.exchange.slices, routed.exchange.num_chunks
    K, T = routing.weight_KT.shape
    limit = routing.capacity if isinstance(routing.capacity, int) else K * T
    local, received = _even_counts(K, T, len(routing.choices.rows_E), limit, slices, chunks)
    return list(local), list(received)


@functools.lru_cache(maxsize=64)
def _even_counts(
    K: int, T: int, experts: int, limit: int, slices: TokenSlices, chunks: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What `RoutedTokens.counts_on_host` returns: this rank's numbers, and from each rank those for this one."""
    senders = [replace(slices, rank=rank) for rank in range(slices.group_size)]
    rows = [
        row_counts(_rows_NPVX(K, T, experts, limit, each, chunks), torch.zeros((), dtype=torch.int64), each)
        for each in senders
    ]
    received = [sent.view(slices.group_size, -1)[slices.rank] for sent, _ in rows]
    return tuple(rows[slices.rank][1].tolist()), tuple(torch.cat(received).tolist())


def _rows_NPVX(K: int, T: int, experts: int, limit: int, slices: TokenSlices, chunks: int) -> Tensor:
    """Rows of each expert; where a token has one row per rank, choices of each expert and these rows."""
    choice_X = torch.arange(T * K)
    expert_X, location_X, chunk_X = choice_X % experts, choice_X // experts, choice_X // K * chunks // max(T, 1)
    local_experts, kept_X = experts // slices.expert_parallel_size, location_X < limit
    per_chunk = slices.group_size * slices.senders * local_experts
    bucket_X = slices.bucket(expert_X, location_X, local_experts) + chunk_X * per_chunk
    shape = (chunks, slices.group_size, slices.senders, local_experts)
    rows_NPVL = torch.bincount(bucket_X[kept_X], minlength=chunks * per_chunk).view(shape)
    if not one_row_per_rank(K, slices):
        return rows_NPVL
    rank_X, tokens = chunk_X * slices.group_size + expert_X // local_experts, max(T, 1)
    copies_X = (rank_X * tokens + choice_X // K)[kept_X].unique() // tokens
    rows_NPV1 = torch.bincount(copies_X, minlength=chunks * slices.group_size).view(*shape[:3], 1)
    return torch.cat([rows_NPVL, rows_NPV1], -1)

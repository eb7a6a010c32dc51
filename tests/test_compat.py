"""What the package computes instead of asking private functions of DeepSpeed, and what it says to an old DeepSpeed."""

from __future__ import annotations

import itertools
from importlib import metadata

import pytest
import torch
from deepspeed.moe import sharded_moe

from scmoe_ds.deepspeed_version import check
from scmoe_ds.moe.capacity import capacity
from scmoe_ds.moe.layout import PaddedLayout


def test_capacity_is_deepspeeds() -> None:
    factors = (1, 1.0, 1.1, 1.25, 2.0, 2.2, 0.3, 1 / 3)
    for T, E, factor, least in itertools.product((1, 3, 7, 40, 127, 4096, 100_003), (1, 3, 4, 7, 64), factors, (0, 4)):
        shape = torch.empty(T, E, device="meta")
        theirs = sharded_moe._capacity(shape, torch.tensor(factor), torch.tensor(least))
        assert capacity(T, E, factor, least) == int(theirs), (T, E, factor, least)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padded_rows_are_deepspeeds(dtype: torch.dtype) -> None:
    buffers, rows, T, D = 6, 5, 12, 8
    buffer_KT = torch.arange(T).repeat(2, 1) % buffers - torch.tensor([[0], [1]])  # some are -1: dropped
    place_KT = torch.arange(T).repeat(2, 1) // buffers + torch.tensor([[0], [2]])
    slot_KT = sharded_moe._route_slots(buffer_KT, place_KT, buffers, rows)
    layout = PaddedLayout.from_rows(slot_KT, buffers, rows)
    results = []
    for encode in (layout.encode, lambda x: sharded_moe._sparse_encode(x, slot_KT, buffers, rows).flatten(0, 1)):
        tokens_TD = torch.randn(T, D, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
        output = encode(tokens_TD)
        direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        results.append((output, *torch.autograd.grad(output, tokens_TD, direction)))
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("found", ["0.17.1", "0.19.3", "none"])
def test_an_older_deepspeed_gets_one_sentence(found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if found == "none":
            raise metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(metadata, "version", version)
    sentence = rf"needs DeepSpeed >= 0\.19\.4, .*; found {found}: pip install \"deepspeed>=0\.19"
    with pytest.raises(ImportError, match=sentence):
        check()
    monkeypatch.setattr(metadata, "version", lambda name: "0.19.10+abc1234")
    check()

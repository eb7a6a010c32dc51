"""The benchmark against AutoEP, where it computes rather than measures: shapes, rows, what stands in for the link."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from unittest.mock import ANY

import pytest
import torch

from benchmarks.harness import autoep_page
from benchmarks.harness.autoep_rows import AGAIN, AUTOEP, Row, adapted, table
from benchmarks.harness.families import FAMILIES, Cut, Family
from benchmarks.harness.no_link import Arrived


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_cut_in_width_and_batch_only(name: str):
    family = FAMILIES[name]
    whole, small = family.config(Cut(1, 1)), family.config(Cut(4, 1))
    for field, value in family.widths.items():
        assert getattr(whole, field) == value
        assert getattr(small, field) * 4 == value
    for field, value in family.counts.items():
        assert getattr(small, field) == value
    for field, value in family.heads.items():
        assert getattr(small, field) == max(value // 4, 1)


@pytest.mark.parametrize(("name", "rows_of"), [*((name, table) for name in FAMILIES), ("qwen3", adapted)])
def test_a_limit_is_the_same_without_communication(name: str, rows_of: Callable[[Family], dict[str, Row]]):
    rows = rows_of(FAMILIES[name])
    assert rows[AUTOEP].architecture == rows[AGAIN].architecture == "autoep"
    for row in rows.values():
        if row.limit is not None:
            limit = rows[row.limit]
            assert row.communicates and not limit.communicates
            assert limit.architecture == row.architecture and limit.parts == row.parts
            assert "train" in limit.modes
        if row.blocking is not None:
            assert rows[row.blocking] == replace(row, overlap={"enabled": False}, blocking=None, fields=ANY, modes=ANY)


def test_without_a_link_counts_and_indices_are_those_that_arrived_and_hidden_states_are_as_many():
    arrived, sent = Arrived(), []

    def exchange(received: torch.Tensor, values: torch.Tensor) -> None:
        sent.append(len(values))
        received.copy_(values)

    for rows, values in ((torch.tensor([1, 2]), torch.tensor([3, 4])), (torch.ones(5, 2), 7 * torch.ones(6, 2))):
        for _ in range(2):
            received = torch.empty_like(values)
            arrived.receive(rows.shape, received, rows, lambda r=received, v=values: exchange(r, v))
            assert received.equal(values)
    assert sent == [2, 6]  # once each

    hidden, received = torch.randn(3, 64), torch.full((5, 64), torch.nan)
    arrived.receive("hidden", received, hidden, pytest.fail)
    assert received[:3].equal(hidden) and not received[3:].any()


def test_the_page_sums_up_every_row_and_says_how_the_link_was_found():
    spread = {"median": 1.7, "p10": 1.6, "p90": 1.8}
    row = {"row": AUTOEP, "median_ms": 400.0, "speedup": spread, "processor_ms": 200.0, "peak_mb": 90.0, "schedule": ""}
    limited = {"limit_speedup": spread, "exposed_ms": {"median": 60.0}, "hidden_share": 0.9, "waited_ms": 9.0}
    cell = {
        "settings": {"family": "qwen3", "share": 0.6, "skew": 1.0, "rounds": 30},
        "environment": {"device": "a CPU"},
        "link": {"rate_mbit": 960.0, "share": 0.61, "all_to_all_ms": 216.0, "layer_ms": 353.0},
        "loads": {"busiest_expert_over_mean": 1.5, "busiest_rank_over_mean": 1.0},
        "modes": {"train": [row, row | limited | {"row": "+ chunks = as_is", "peak_mb": 72.0}]},
        "differences": {"+ chunks = as_is": 1e-7},
    }
    skewed = cell | {"settings": cell["settings"] | {"skew": 3.0}, "link": {"rate_mbit": 960.0}}
    text = autoep_page.page({"cells": [skewed, cell]})
    assert "960 Mbit/s, all-to-all 216 of 353 ms (61 %)" in text
    assert "| Qwen3-30B-A3B, 60 % | 1.700 (1.600–1.800) |  |  |  |  | 0.80 |" in text
    assert text.count("| 1.50 | 1.00 | 400 | 400 | 1.700") == 2  # the curve begins without skew
    assert "| + chunks = as_is | 400 | 1.700 (1.600–1.800) | 1.70 | 60 | 90 % | 9 |  | 200 | 72 |" in text

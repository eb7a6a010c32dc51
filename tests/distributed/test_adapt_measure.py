"""scmoe adapt --measure on two ranks that share experts: the losses of one process, and times of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lab.distributed import run_distributed
from scmoe_ds.engine import connect
from scmoe_ds.models.layers import GPTSettings
from scmoe_ds.programs import adapt
from tests.helpers.exports import whole_model, write_export

SETTINGS = GPTSettings(num_layers=4, hidden_size=16, num_attention_heads=2, vocab_size=257, max_position_embeddings=16)


def measured(directory: Path, name: str) -> dict[str, Any]:
    flags = ["--measure", str(directory / "text.txt"), "--position", "pos2", "--batch-size", "2"]
    assert adapt.main([str(directory / "top2"), *flags, "--output-prefix", str(directory / name)]) == 0
    found: dict[str, Any] = json.loads((directory / f"{name}.json").read_text())
    return found


def test_two_ranks(tmp_path: Path) -> None:
    connect()
    write_export(tmp_path / "top2", whole_model(SETTINGS, {"architecture": "topk", "num_experts": 4, "top_k": 2}))
    (tmp_path / "text.txt").write_text("the model reads a text and says which word comes next\n" * 2)
    alone = measured(tmp_path, "alone")
    together = run_distributed(measured, 2, tmp_path, "together")[0]
    assert "No times are known" in alone["times"] and "random tokens on these ranks" in together["times"]
    assert together["loss"] == pytest.approx(alone["loss"], abs=1e-5)
    for one, other in zip(alone["ways"], together["ways"], strict=True):
        assert one["all"]["loss"] == pytest.approx(other["all"]["loss"], abs=1e-5)
        for here, there in zip(one["layers"], other["layers"], strict=True):
            assert here["loss"] == pytest.approx(there["loss"], abs=1e-5)
            assert there["before_ms"] > 0 and there["after_ms"] > 0 and "before_ms" not in here

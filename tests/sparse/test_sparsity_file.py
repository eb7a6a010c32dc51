"""What sparsity.json says of thresholds is what a count of the choices finds."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from scmoe_ds.errors import ArgumentError, CheckpointError
from scmoe_ds.sparse.sparsity_file import FILE, Method, Sparsity, curve_of, digest_of

SPREAD = 0.03
GATES, INPUTS = ([torch.randn(size, 8, generator=torch.Generator().manual_seed(size))] * 2 for size in (4, 6))
CHOICES = [torch.rand(20000, generator=torch.Generator().manual_seed(seed)).square() for seed in (3, 4)]


def made() -> Sparsity:
    layers = tuple(curve_of(f"layer {number}", each, SPREAD, 0.7) for number, each in enumerate(CHOICES))
    known = {"gates": digest_of(GATES), "neurons": digest_of(INPUTS), "top_k": 2, "tokens": 10000}
    return Sparsity(**known, measure="abs-gate", spread=SPREAD, layers=layers)


@pytest.mark.parametrize("method", ["1t", "2t"])
@pytest.mark.parametrize("rate", [0.02, 0.25, 0.6, 0.98])
def test_thresholds_leave_the_wanted_share_out(rate: float, method: Method) -> None:
    for (skip, halve), criterion in zip(made().thresholds(rate, method), CHOICES, strict=True):
        left_out = ((criterion < skip).double().mean() + (criterion < halve).double().mean()) / 2
        assert left_out.item() == pytest.approx(rate, abs=0.004)
        assert halve - skip == pytest.approx(2 * SPREAD if method == "2t" else 0)


def test_a_curve_goes_both_ways() -> None:
    layer = made().layers[0]
    for method in ("1t", "2t"):
        assert layer.rate(layer.threshold_for(0.4, method), method) == pytest.approx(0.4)
        assert layer.rate(-1, method) == 0 and layer.rate(2, method) == 1


def test_choices_that_are_all_alike_have_a_curve() -> None:
    layer = curve_of("alike", torch.full((10,), 0.5), 0.01)
    assert (layer.rate(0.5, "1t"), layer.rate(0.5, "2t")) == (0, 0.5)
    assert layer.threshold_for(0.25, "1t") == pytest.approx(0.5)  # none or all: no threshold does it


def test_a_file_is_read_as_it_was_written_and_knows_its_checkpoint(tmp_path: Path) -> None:
    made().write(tmp_path)
    found = Sparsity.read(tmp_path)
    assert found == made()
    gates, inputs = digest_of(gate.bfloat16() for gate in GATES), digest_of(INPUTS)
    found.check("--load export", gates, inputs, 2)
    found.check("--load export", gates, None, 2)
    for others in ([GATES[0], GATES[1] * 1.1], GATES[:1]):
        with pytest.raises(CheckpointError, match="another checkpoint, with other gates, so"):
            found.check("--load export", digest_of(others), inputs, 2)
    with pytest.raises(CheckpointError, match="with 2 experts of a token, and here are 1"):
        found.check("--load export", gates, inputs, 1)
    first_of_two_parts = [each[:3] for each in INPUTS]
    for others in ([INPUTS[0], INPUTS[1].flip(0)], first_of_two_parts):
        with pytest.raises(CheckpointError, match="other neurons, or the same in another order"):
            found.check("--load export", gates, digest_of(others), 2)


@pytest.mark.parametrize("rate", [0, 1, 1.5, -0.1, float("nan")])
def test_a_rate_is_above_0_and_below_1(rate: float) -> None:
    with pytest.raises(ArgumentError, match="above 0 and below 1"):
        made().thresholds(rate, "1t")


def test_neurons_as_trained_have_no_halves() -> None:
    unsorted = made().model_copy(update={"measure": None})
    assert unsorted.thresholds(0.25, "1t")
    with pytest.raises(ArgumentError, match="scmoe sparsify"):
        unsorted.thresholds(0.25, "2t")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": 2}, "version"),
        ({"layers": []}, "layers"),
        ({"spread": -1}, "spread"),
        ({"spread": 1}, "spread"),
        ({"measure": "abs_gate"}, "measure"),
        ({"colour": 1}, "colour"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, change: dict[str, object], words: str) -> None:
    (tmp_path / FILE).write_text(json.dumps(made().model_dump() | change))
    with pytest.raises(CheckpointError, match=f"damaged: {words}.*scmoe sparsify"):
        Sparsity.read(tmp_path)


def test_falling_rates_no_json_and_no_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        Sparsity.read(tmp_path)
    (tmp_path / FILE).write_text("{")
    with pytest.raises(CheckpointError, match="damaged"):
        Sparsity.read(tmp_path)
    whole = json.loads(made().model_dump_json())
    whole["layers"][0]["rate_2t"].reverse()
    (tmp_path / FILE).write_text(json.dumps(whole))
    with pytest.raises(CheckpointError, match="do not fall"):
        Sparsity.read(tmp_path)
    whole["layers"][0]["rate_2t"] = [0.0] * len(whole["layers"][0]["threshold"])
    (tmp_path / FILE).write_text(json.dumps(whole))
    with pytest.raises(CheckpointError, match=r"damaged: layers\.0: a curve ends where all is left out"):
        Sparsity.read(tmp_path)


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, lambda path: os.symlink(FILE, path)])
def test_what_is_no_file_is_not_waited_for(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / FILE)
    with pytest.raises(CheckpointError, match=r"sparsity\.json: is no file but .*; remove it, and make it with"):
        Sparsity.read(tmp_path)

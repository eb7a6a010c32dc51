"""What the flags of generate and evaluate leave out, how it is told, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from scmoe_ds.engine import connect
from scmoe_ds.inference.attachment import moe_layers
from scmoe_ds.inference.droppable import digests_of
from scmoe_ds.inference.dropping import Dropping, drop_experts
from scmoe_ds.inference.load import load_trained
from scmoe_ds.models.gpt import GPT
from scmoe_ds.moe.decisions.dropping import criterion
from scmoe_ds.moe.gate import Routing
from scmoe_ds.programs import evaluate, generate
from scmoe_ds.sparse.sparsity_file import FILE, Sparsity, curve_of
from tests.helpers.exports import whole_model, write_export
from tests.helpers.settings import GPT2

TEXT = "Which of the experts matter for a token, and which of them hardly do? " * 20


class Listener:
    """A routing rule that changes nothing."""

    in_training = False

    def __init__(self) -> None:
        self.heard: list[torch.Tensor] = []

    def apply(self, routing: Routing) -> Routing:
        self.heard.append(criterion(routing).flatten())
        return routing


def sparsity_of(model: GPT, **fields: Any) -> Sparsity:
    """Curves on the text itself, read in windows of the context."""
    layers = moe_layers(model)
    for layer in layers.values():
        layer.routing_rule = Listener()
    tokens = torch.tensor([256, *TEXT.encode()[:-1]])
    with torch.no_grad():
        for window in tokens.split(48):
            model(window.unsqueeze(0))
    curves = []
    for name, layer in layers.items():
        curves.append(curve_of(name, torch.cat(layer.routing_rule.heard), 0.01))
        layer.routing_rule = None
    gates, neurons = digests_of(list(layers.values()))
    known = {
        "gates": gates,
        "neurons": neurons,
        "top_k": 1,
        "measure": "abs-gate",
        "spread": 0.01,
        "tokens": len(tokens),
    }
    return Sparsity(**{**known, "layers": tuple(curves), **fields})


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """An export beside its sparsity.json, some of whose fields are given."""
    connect()

    def export(top_k: int, /, **fields: Any) -> Path:
        model = whole_model(GPT2, {"num_experts": 4, "top_k": top_k})
        path = write_export(tmp_path_factory.mktemp("export") / "sparse", model)
        sparsity_of(model, **{"top_k": top_k, **fields}).write(path)
        (path.parent / "text.txt").write_text(TEXT)
        return path

    return export


def evaluated(path: Path, *flags: str) -> dict[str, Any]:
    out = path.parent / "out.json"
    text = str(path.parent / "text.txt")
    how = ["--load", str(path), "--text-file", text, "--stride", "48", "--output", str(out)]
    assert evaluate.main([*how, *flags]) == 0
    found: dict[str, Any] = json.loads(out.read_text())["results"]
    return found


@pytest.mark.parametrize("top_k", [1, 2])
def test_quality_rate_and_time_stand_beside_each_other(
    make: Callable[..., Path], top_k: int, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make(top_k)
    plain = evaluated(path)
    assert "drops" not in plain
    one, two = evaluated(path, "--drop-rate", "0.3", "--drop-method", "1t"), evaluated(path, "--drop-rate", "0.3")
    for found, halved in ((one, 0.0), (two, pytest.approx(2 * (two["drops"]["dropped"] - two["drops"]["skipped"])))):
        # Windows of the evaluation are those of the calibration, but for the rows of their last tokens.
        assert found["drops"]["dropped"] == pytest.approx(0.3, abs=0.03)
        assert found["drops"]["halved"] == halved
        assert found["loss"] != found["without_drops"]["loss"] == pytest.approx(plain["loss"], rel=1e-6)
        assert found["tokens_per_second"] > 0 and found["without_drops"]["tokens_per_second"] > 0
    assert two["drops"]["halved"] > 0
    told = capsys.readouterr()
    assert "2T-Drop at a rate of 0.3 (--no-drop computes all)" in told.err
    assert "of the routed experts' computation left out" in told.out


def test_the_rate_of_the_file_holds_unless_flags_say_otherwise(
    make: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = make(1, rate=0.5, measure=None)
    assert evaluated(path)["drops"]["dropped"] == pytest.approx(0.5, abs=0.03)
    assert "drops" not in evaluated(path, "--no-drop")
    assert evaluated(path, "--drop-rate", "0.1")["drops"]["dropped"] == pytest.approx(0.1, abs=0.03)
    for flags, said in ((["--no-drop"], False), ([], True)):
        assert generate.main(["--load", str(path), "--prompt", TEXT[:30], "--max-new-tokens", "4", *flags]) == 0
        assert ("% of the rows skipped, 0.0% halved" in capsys.readouterr().err) == said
    (path / FILE).unlink()
    (path / FILE).symlink_to("nowhere")  # its name is there: all experts would not be what was asked for
    assert generate.main(["--load", str(path), "--prompt", TEXT[:30]]) == 2
    assert "sparsity.json: is no file but a directory, a pipe or a broken link" in capsys.readouterr().err


def test_offloaded_experts_and_those_in_low_precision_skip(
    make: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--load", str(make(1)), "--prompt", TEXT[:30], "--max-new-tokens", "4"]
    for more in (["--experts", "offload-async"], ["--low-precision", "all", "--low-precision-min-tokens", "0"]):
        assert generate.main([*flags, *more, "--drop-rate", "0.4", "--drop-method", "1t"]) == 0
        assert "of the rows skipped" in capsys.readouterr().err


REFUSED: dict[str, tuple[dict[str, Any], list[str], str]] = {
    "another checkpoint": ({"gates": "0" * 64}, ["--drop-rate", "0.2"], "sparsity.json is of another checkpoint"),
    "another order of neurons": ({"neurons": "0" * 64}, ["--drop-rate", "0.2"], "or the same in another order, so"),
    "another model with these gates": ({"top_k": 2}, [], "with 2 experts of a token, and here are 1, so"),
    "one rank": ({}, ["--drop-rate", "0.2", "--drop-load-aware"], "--drop-load-aware: one rank has all experts"),
    "neurons as trained": (
        {"measure": None},
        ["--drop-rate", "0.2", "--drop-method", "2t"],
        "2T-Drop computes half of an expert, but the neurons of this model are as trained",
    ),
    "no rate": ({}, ["--drop-method", "1t"], "--drop-rate: is missing, and"),
    "halves of experts that are fetched": (
        {},
        ["--drop-rate", "0.2", "--experts", "offload"],
        "--drop-method 2t: does not go with offloaded experts, as both change the experts of a layer; use --experts",
    ),
    "low precision, and drops that nobody asked for": (
        {"rate": 0.2},
        ["--low-precision", "all"],
        "low precision: does not go with halves of experts, as both change the experts of a layer; add --no-drop, or",
    ),
    "copies, and drops that nobody asked for": (
        {"rate": 0.2},
        ["--expert-copies", "1"],
        "--expert-copies 1: does not go with drops, as both change the routing rule of a layer; add --no-drop, or",
    ),
}


@pytest.mark.parametrize(("fields", "flags", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_dropped_is_refused(
    make: Callable[..., Path],
    fields: dict[str, Any],
    flags: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert generate.main(["--load", str(make(1, **fields)), "--prompt", "a", *flags]) == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in told


def test_a_second_rule_is_refused(make: Callable[..., Path]) -> None:
    loaded = load_trained(make(1))
    assert drop_experts(loaded, Dropping(0.2)) is not None
    with pytest.raises(
        ValueError, match="1t: does not go with drops, as both change the routing rule of a layer; add --no-drop"
    ):
        drop_experts(loaded, Dropping(0.2, "1t"))

"""scmoe analyze feasibility: numbers against a computation by hand, both pages, and what a user can get wrong."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from scmoe_ds.analysis import feasibility
from scmoe_ds.analysis.feasibility import conclude, study
from scmoe_ds.planner.times import OperatorTimes
from scmoe_ds.programs import analyze as analyze_program

IDENTITY = {"num_layers": 4, "hidden_size": 16, "moe_blocks": [1, 3], "num_experts": [8, 8]}
MS = {"attention": (6, 10), "attention 2": (6, 10), "mlp": (4, 8), "shared": (4, 8)}


def part(forward: float, backward: float) -> dict[str, float]:
    return {"forward_ms": forward, "backward_ms": backward}


def entry(*operators: str, transfer: float = 5, experts: float = 3, top_k: int = 1) -> dict[str, Any]:
    """An entry of a calibration whose four transfers are alike; the gate takes 1 ms, encode and decode none."""
    moved = part(transfer, transfer)
    times = {
        "gate": part(1, 1),
        "encode": part(0, 0),
        "decode": part(0, 0),
        "backbone": [{"name": name, **part(*MS[name])} for name in operators],
        "chunks": {"1": {"dispatch": moved, "combine": moved, "experts": part(experts, 2 * experts)}},
    }
    description = {"operators": list(operators), "top_k": top_k, "ranks_that_exchange": 8}
    return {"identity": IDENTITY, "description": description, "times": times}


def studied(*operators: str, **changes: Any) -> feasibility.KindStudy:
    made = entry(*operators, **changes)
    return study(made["description"], OperatorTimes.model_validate(made["times"]))


def verdict(**cosines: tuple[float, ...]) -> dict[str, Any]:
    """Cosines by position, one for each MoE layer (blocks 1, 3, …)."""
    positions = {}
    for name in ("pos1", "pos2", "pos3"):
        found = cosines.get(name, (0.95, 0.95))
        layers = [{"stage": 0, "block": 2 * n + 1, "cosine": each} for n, each in enumerate(found)]
        positions[name] = {
            "layers": layers,
            "mean": sum(found) / len(found),
            "least": min(found),
            "passes": min(found) >= 0.8,
        }
    return {"threshold": 0.8, "positions": positions, "text": [f"{name}: a sentence <of> it" for name in positions]}


POS2 = ("mlp", "attention", "shared")
POS3 = ("attention", "mlp", "attention 2", "shared")
# position: window forward and backward, ScMoE, without overlap, top-2 without shared expert (ms, forward), hidden share,
# the largest hidden all-to-all (forward).
FORWARD = {
    "pos1": (10, 18, 1 + 6 + 3 + 5, 1 + 10 + 3 + 10, 1 + 6 + 2 * (3 + 10), 0.9, 4),
    "pos2": (14, 26, 1 + 10 + 3 + 5, 1 + 14 + 3 + 10, 1 + 10 + 2 * (3 + 10), 0.9, 4),
    "pos3": (20, 36, 1 + 20 + 3, 1 + 20 + 3 + 10, 1 + 16 + 2 * (3 + 10), 1.0, 10),
}


@pytest.mark.parametrize("operators", [POS2, POS3])
@pytest.mark.parametrize("position", FORWARD)
def test_numbers(position: str, operators: tuple[str, ...]) -> None:
    kind = studied(*operators)
    forward_ms, backward_ms, scmoe, serial, standard, hidden, largest = FORWARD[position]
    found = kind.positions[position]
    assert (found.window_ms("forward"), found.window_ms("backward")) == (forward_ms, backward_ms)
    assert ("standing for two" in found.source) == (position == "pos3" and operators == POS2)
    assert kind.communication_ms("forward") == 10
    each = found.predictions["forward"]
    assert each.plan.predicted.total_ms == pytest.approx(scmoe) and each.plan.serial.total_ms == pytest.approx(serial)
    assert each.standard_ms == pytest.approx(standard)
    assert each.speedups == pytest.approx((serial / scmoe, standard / scmoe))
    assert each.plan.predicted.hidden_share == pytest.approx(hidden) and each.hidden_ms == pytest.approx(10 * hidden)
    assert (each.limits.largest_hidden_ms, each.limits.shared_ms) == (largest, 4)


def test_training_and_top_k() -> None:
    each = studied(*POS3).positions["pos3"].predictions["train"]
    assert each.plan.predicted.total_ms == pytest.approx(24 + (1 + 36 + 6))
    assert each.plan.serial.total_ms == pytest.approx(34 + (1 + 36 + 6 + 10))
    assert each.standard_ms == pytest.approx(43 + (1 + 28 + 2 * (6 + 10))) and each.limits.shared_ms == 12
    # The standard MoE of a top-2 ScMoE is top-3: one and a half times its transfers and experts.
    assert studied(*POS3, top_k=2).positions["pos3"].predictions["forward"].standard_ms == pytest.approx(17 + 1.5 * 13)


def test_what_was_not_timed_stays_empty() -> None:
    kind = studied("attention", "shared")
    assert kind.positions["pos1"].predictions
    for name in ("pos2", "pos3"):
        found = kind.positions[name]
        assert found.source == "not timed: mlp" and not found.predictions and found.window_ms("forward") is None
    assert conclude([studied("mlp", "attention")])[0].startswith("cannot be said")


def test_conclusion() -> None:
    """Times decide: Pos-3 hides 10 ms where the others hide 9, of which 1 % of the serial step is 0.8 ms."""
    word, best = conclude([studied(*POS2)])
    assert word == "pays at Pos-3, by these times; what it does to the quality, only training says" and best == "pos3"
    assert conclude([studied(*POS2, transfer=3.9)])[1] == "pos2", "where all hide the same, the default"
    assert conclude([studied(*POS2, transfer=0)])[0].startswith("does not pay: nothing travels")
    word, best = conclude([studied(*POS2, transfer=0.01)])
    assert word.startswith("does not pay: at Pos-2") and "takes as long as the same without overlap" in word


def test_a_position_must_pay_for_all_kinds() -> None:
    """The second kind has experts that cost nothing to double, and a shared expert that top-2 lacks: a loss."""
    slow = studied(*POS2, transfer=0.1, experts=0.1)
    _, standard = slow.positions["pos2"].predictions["train"].speedups
    assert standard < 0.99 and not slow.positions["pos2"].predictions["train"].pays
    word, _ = conclude([studied(*POS2), slow])
    assert word.startswith("does not pay") and "takes" in word and "% longer than top-2 MoE" in word
    assert conclude([studied("attention", "shared"), studied(*POS2)])[1] == "pos3", "untimed in one kind, it may pay"


@pytest.fixture
def files(tmp_path: Path) -> Path:
    whole = {"kind": "similarity", "model": "gpt|2 & co", "identity": IDENTITY, "verdict": verdict(pos3=(0.91, 0.7))}
    (tmp_path / "similarity.json").write_text(json.dumps(whole))
    (tmp_path / "times.json").write_text(json.dumps([entry(*POS2)]))
    (tmp_path / "kinds.json").write_text(json.dumps([entry("attention", "shared"), entry(*POS2, transfer=7.25)]))
    old = [{key: value for key, value in each.items() if key != "identity"} for each in (whole, entry(*POS2))]
    (tmp_path / "old_similarity.json").write_text(json.dumps(old[0]))
    (tmp_path / "old_times.json").write_text(json.dumps(old[1:]))
    wide = {**IDENTITY, "hidden_size": 32}
    (tmp_path / "wide.json").write_text(json.dumps([entry(*POS2) | {"identity": wide}]))
    (tmp_path / "both.json").write_text(json.dumps([entry(*POS2), entry(*POS2) | {"identity": wide}]))
    (tmp_path / "unknown.json").write_text(json.dumps([entry(*POS2) | {"identity": {}}]))
    (tmp_path / "gating.json").write_text('{"kind": "gating"}')
    (tmp_path / "broken.json").write_text('{"kind": "similarity", "model": "m"}')
    (tmp_path / "text.json").write_text("text")
    (tmp_path / "empty.json").write_text("[]")
    (tmp_path / "no_times.json").write_text('[{"description": {}}]')
    (tmp_path / "no_description.json").write_text(json.dumps([{"times": {}}]))
    (tmp_path / "top_k.json").write_text(json.dumps([entry(*POS2) | {"description": {"top_k": "two"}}]))
    return tmp_path


def run(directory: Path, *flags: str) -> int:
    return analyze_program.main(["feasibility", *(flag.replace("DIR", str(directory)) for flag in flags)])


GOOD = ("--similarity", "DIR/similarity.json", "--calibration", "DIR/times.json", "--output-prefix", "DIR/out")


def test_pages(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    was_initialized = dist.is_initialized()
    assert run(files, *GOOD) == 0
    assert dist.is_initialized() == was_initialized, "it needs no process group"
    assert re.match(r"ScMoE pays at Pos-3.*\nwrote ", capsys.readouterr().out)
    text, web = (files / "out.md").read_text(), (files / "out.html").read_text()
    for number in (
        "0.805",
        "0.700",
        "unlike in 1 of 2 MoE layers (least 0.700)",
        "−0.046 ± 0.004",
        "hidden_size: 16",
        "10.00",
        "14.00",
        "20.00",
        "19.00",
        "28.00",
        "37.00",
        "90 %",
        "1.47 ×",
        "1.95 ×",
        "mlp",
        "8.00",
        "Predicted, not measured",
        "twice",
    ):
        assert number in text and number in web, number
    # The page's own marks agree with what it recommends.
    assert "| Pos-3 |" in text and re.search(r"\| Pos-3 \|[^|]*\| pays \| unlike in 1 of 2", text)
    assert '"position": "pos3"' in text and "![" in text and "(out.png)" in text and r"gpt|2 & co" in text
    assert "gpt|2 &amp; co" in web and "&lt;of&gt;" in web and "data:image/png;base64," in web
    assert not re.search(r'(src|href)="(?!data:)', web), "nothing outside of the file"
    assert (files / "out.png").read_bytes().startswith(b"\x89PNG")


def test_several_kinds(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(files, *GOOD[:3], "DIR/kinds.json", *GOOD[4:]) == 0
    assert capsys.readouterr().out.count("ScMoE ") == 1, "a JSON has one position"
    text = (files / "out.md").read_text()
    for expected in (
        "| Pos-2, kind 1 of 2 of MoE layers | not timed: mlp; a calibration at",
        "| Pos-2, kind 2 of 2 of MoE layers |",
        "7.25",
    ):
        assert expected in text, expected


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    """The program's own help lists it, and its help has its flags."""
    expected = {("--help",): " feasibility one page: would ScMoE pay", ("feasibility", "--help"): "--output-prefix"}
    for flags, text in expected.items():
        with pytest.raises(SystemExit, match=r"^0$"):
            analyze_program.main(flags)
        assert text in " ".join(capsys.readouterr().out.split())


BAD = {
    "no similarity": (GOOD[2:], "--similarity is missing"),
    "no calibration": ((*GOOD[:2], *GOOD[4:]), "--calibration is missing"),
    "no prefix": (GOOD[:4], "--output-prefix is missing"),
    "similarity nowhere": (
        ("--similarity", "DIR/no.json", *GOOD[2:]),
        "--similarity DIR/no.json cannot be read as JSON",
    ),
    "similarity no JSON": (
        ("--similarity", "DIR/text.json", *GOOD[2:]),
        "--similarity DIR/text.json cannot be read as JSON",
    ),
    "gating": (
        ("--similarity", "DIR/gating.json", *GOOD[2:]),
        '--similarity DIR/gating.json is no record of "similarity"',
    ),
    "calibration as record": (
        ("--similarity", "DIR/times.json", *GOOD[2:]),
        '--similarity DIR/times.json is no record of "similarity"',
    ),
    "incomplete": (("--similarity", "DIR/broken.json", *GOOD[2:]), "--similarity DIR/broken.json is incomplete"),
    "calibration nowhere": ((*GOOD[:3], "DIR/no.json", *GOOD[4:]), "--calibration DIR/no.json cannot be read"),
    "record as calibration": (
        (*GOOD[:3], "DIR/gating.json", *GOOD[4:]),
        "--calibration DIR/gating.json is not a calibration",
    ),
    "old similarity": (
        ("--similarity", "DIR/old_similarity.json", *GOOD[2:]),
        "--similarity DIR/old_similarity.json does not say which model it is of",
    ),
    "old times": (
        (*GOOD[:3], "DIR/old_times.json", *GOOD[4:]),
        "--calibration DIR/old_times.json does not say which model it is of",
    ),
    "two models": (
        (*GOOD[:3], "DIR/wide.json", *GOOD[4:]),
        "--similarity DIR/similarity.json and --calibration DIR/wide.json are of two models (hidden_size 16 and 32)",
    ),
    "two models in one file": ((*GOOD[:3], "DIR/both.json", *GOOD[4:]), "has times of several models"),
    "a model without sizes": ((*GOOD[:3], "DIR/unknown.json", *GOOD[4:]), "do not say whether they are of one model"),
    "empty": ((*GOOD[:3], "DIR/empty.json", *GOOD[4:]), "--calibration DIR/empty.json has no times"),
    "no times": ((*GOOD[:3], "DIR/no_times.json", *GOOD[4:]), "--calibration DIR/no_times.json is damaged: times"),
    "no description": ((*GOOD[:3], "DIR/no_description.json", *GOOD[4:]), "has no description"),
    "top_k": ((*GOOD[:3], "DIR/top_k.json", *GOOD[4:]), "--calibration DIR/top_k.json is damaged: top_k 'two'"),
    "prefix nowhere": ((*GOOD[:5], "DIR/no/out"), "--output-prefix DIR/no/out cannot be written"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags, message = BAD[case]
    assert run(files, *flags) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("scmoe analyze: error: ") and errors.count("\n") == 1
    assert message.replace("DIR", str(files)) in errors
    assert not (files / "out.md").exists()

"""scmoe report: what it says of measured steps, and a run in one process. Two ranks: tests/distributed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from scmoe_ds.compat import forget_process_groups
from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.planner.plan import plan
from scmoe_ds.planner.plan_text import plan_lines
from scmoe_ds.planner.rounds import Spread
from scmoe_ds.planner.speed_text import compared, compared_as_measured
from scmoe_ds.planner.times import OperatorTimes
from scmoe_ds.programs import report
from scmoe_ds.programs.flags.report import parse_arguments
from scmoe_ds.programs.report_text import DEEPSPEED, OURS, SERIAL, Measured, details, reasons, sentence
from scmoe_ds.trace.spans import HiddenShare

ROOT = Path(__file__).parents[2]
FLAGS = "--num-layers 2 --hidden-size 16 --num-attention-heads 2 --seq-length 8".split()


def part(each_ms: float) -> dict[str, float]:
    return {"forward_ms": each_ms, "backward_ms": each_ms}


def times(transfer: float = 5, gate: float = 0, shared: float = 10) -> OperatorTimes:
    """Each number counts forward and backward; the window is 20 + 2 · `shared`."""
    one = {"dispatch": part(transfer), "combine": part(transfer), "experts": part(10)}
    backbone = [{"name": "attention", **part(10)}, {"name": "shared", **part(shared)}]
    parts: dict[str, Any] = {"gate": part(gate), "encode": part(0), "decode": part(0), "backbone": backbone}
    return OperatorTimes.model_validate({**parts, "chunks": {1: one}})


def measured(
    ours: float, serial: float | None, deepspeed: float | None, hidden: float = 0.9, of: Any = None, **section: Any
) -> Measured:
    """Steps of these milliseconds, four rounds; two layers of pairs."""
    given = {OURS: ours, SERIAL: serial, DEEPSPEED: deepspeed}
    seconds = {name: [1e-3 * ms * drift for drift in (1, 1.1, 0.9, 1)] for name, ms in given.items() if ms}
    travelled = HiddenShare(100, 100 * (1 - hidden))
    return Measured(
        config=ScMoEConfig(**section),
        ranks=4,
        baseline="DeepSpeed's top-2",
        seconds=seconds,
        hidden={"forward": travelled, "backward": travelled},
        times=[(of or times(), 2)] if serial else [],
        accumulation=1,
    )


EP = {"expert_parallel_size": 4}
SENTENCES = [
    (
        measured(100, 120, 131, hidden=0.97, **EP),
        "overlap hides 97 % of the communication; a step is 1.31 × as fast as DeepSpeed's top-2, measured",
    ),
    (
        measured(116, 120, 100, **EP),
        "overlap hides 90 % of the communication; a step takes 16 % longer than DeepSpeed's top-2, measured",
    ),
    (
        measured(100, 120, 100.4, **EP),
        "overlap hides 90 % of the communication; a step shows no measurable difference to DeepSpeed's top-2",
    ),
    (
        measured(100, None, 120),
        "no token travels between ranks, so there is no communication to hide; a step is 1.20 × as fast as DeepSpeed's "
        "top-2, measured",
    ),
    (
        measured(100, None, 120, architecture="shared_expert", **EP),
        "DeepSpeed's own layers hide none of their communication; a step is 1.20 × as fast as DeepSpeed's top-2, "
        "measured",
    ),
    (
        measured(100, None, None, architecture="topk", **EP),
        "DeepSpeed's own layers hide none of their communication; a step takes 100.0 ms with DeepSpeed's top-2, "
        "measured",
    ),
]


@pytest.mark.parametrize(("found", "expected"), SENTENCES, ids=range(len(SENTENCES)))
def test_the_first_line(found: Measured, expected: str) -> None:
    assert sentence(found) == expected


# Communication of a step: 2 layers of 20 ms times `transfer` / 5.
REASONS = {
    "a gain needs no advice": (measured(100, 120, 131, **EP), None),
    "little travels": (measured(1000, 1000, 900, of=times(0.5), **EP), "communication is only 0.4 % of a step"),
    "overlap costs": (measured(130, 120, 100, **EP), '"overlap": {"enabled": false} is faster here'),
    "a short window": (measured(130, 140, 120, hidden=0.4, of=times(20), **EP), '"position": pos3 has a longer window'),
    "padded": (
        measured(130, 140, 120, hidden=0.4, of=times(20), dispatch="padded", **EP),
        '"dispatch": "exact" or less than "capacity_factor": 2',
    ),
    "a long window": (measured(130, 140, 120, hidden=0.4, of=times(5), **EP), "the window is long enough"),
    "a slow layer": (measured(120, 140, 100, of=times(gate=9), **EP), "a larger micro-batch"),
    "one expert parallel rank": (measured(100, None, 80), "scmoe.expert_parallel_size is 1"),
    "DeepSpeed's layer": (measured(100, None, None, architecture="topk"), 'from "topk" to "scmoe"'),
}


@pytest.mark.parametrize("case", REASONS)
def test_what_to_change(case: str) -> None:
    found, expected = REASONS[case]
    advice = [line for line in reasons(found) if line.startswith("to change: ")]
    assert advice == [] if expected is None else expected in " ".join(advice), advice


def test_the_cause_of_a_loss_can_be_told() -> None:
    """116 = 140 / 1.207 · …: overlap gains, the layer loses more."""
    lines = reasons(measured(116, 140, 100, **EP))
    assert lines[0].startswith("in all a step takes 16 % longer than DeepSpeed's top-2 (0.86–0.86 × in 4 rounds)")
    assert lines[1].startswith("with overlap a step is 1.21 × as fast as the same without overlap")
    assert lines[2].startswith("without overlap a step takes 40 % longer than DeepSpeed's top-2")
    table = "\n".join(details(measured(116, 140, 100, **EP)))
    assert "116.0  (104.4–127.6)" in table and "28.6 % of a step without overlap" in table


def test_words_of_a_comparison() -> None:
    assert compared(1.31, "X") == "is 1.31 × as fast as X"
    assert compared(0.84, "X") == "takes 19 % longer than X"
    assert compared(0.995, "X") == compared(1.005, "X") == "takes as long as X"
    assert compared_as_measured(Spread(1.2, 0.99, 1.4), "X") == "shows no measurable difference to X"
    assert compared_as_measured(Spread(0.8, 0.7, 0.9), "X") == "takes 25 % longer than X"


def test_the_log_does_not_call_a_loss_a_gain() -> None:
    """Of the planner's line: with 0.2 ms of 60 there is nothing to gain, and the line says why."""
    for transfer, expected in ((5.0, "overlap pays: the pair is 1."), (0.05, "overlap gains nothing here: the pair")):
        of = times(transfer)
        (line,) = plan_lines("MoE layer 0", of, plan(of, "train"), plan(of, "forward"))[-1:]
        assert line.startswith(expected)
        assert ("communication is 0 % of its time" in line) == (transfer < 1)


@pytest.fixture
def forgotten() -> Iterator[None]:
    yield
    forget_process_groups()


def write(path: Path, **section: Any) -> list[str]:
    whole = json.loads((ROOT / "ds_configs" / "gpt_small_cpu.json").read_text())
    whole["tensorboard"]["output_path"] = str(path / "board")
    whole["scmoe"] |= {"expert_parallel_size": 1, **section}
    (path / "ds.json").write_text(json.dumps(whole))
    return ["--deepspeed_config", str(path / "ds.json"), *FLAGS]


@pytest.mark.parametrize("architecture", ["scmoe", "topk"])
def test_one_process(
    architecture: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    forgotten: None,
) -> None:
    monkeypatch.setattr(report, "ROUNDS", (2, 2))
    assert report.main([*write(tmp_path, architecture=architecture), "--details"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert "a step" in out[0] and "DeepSpeed's top-2" in out[0], out
    assert any(line.startswith("whole steps, ms: median") for line in out)
    assert [path.name for path in tmp_path.iterdir()] == ["ds.json"], "it writes nothing"


def test_what_concerns_training_alone_is_not_asked_for(tmp_path: Path) -> None:
    flags = write(tmp_path)
    args, loaded = parse_arguments([*flags, "--train-samples", "5", "--save-interval", "3", "--data-path", "nowhere"])
    assert args.train_iters is None and not loaded.whole.keys() & {"scheduler", "tensorboard"}
    assert not args.details and parse_arguments([*flags, "--details"])[0].details


def test_deepspeeds_layer_has_as_many_experts_per_token() -> None:
    for section, expected in (
        ({"position": "pos3", "capacity_factor": 1.5}, 2),
        ({"top_k": 2}, 3),
        ({"architecture": "pipelined_topk"}, 2),
        ({"architecture": "dgmoe"}, 2),
        ({"num_experts": [1, 4]}, 1),
    ):
        found = report.baseline_section(ScMoEConfig(**section))
        ScMoEConfig(**found)  # valid
        assert found["architecture"] == "topk" and found["top_k"] == expected
        assert found.get("capacity_factor") == section.get("capacity_factor") and "position" not in found

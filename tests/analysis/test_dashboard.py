"""The page of `scmoe dashboard`: its numbers, its text as text, and what a browser makes of it."""

from __future__ import annotations

import json
import re
import shutil
import statistics
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from scmoe_ds.analysis import dashboard
from scmoe_ds.programs import dashboard as program
from scmoe_ds.training.record import RecordWriter

EVIL = "</script><b onload='x'>bold</b>"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
TIMELINE = [
    {"phase": "forward", "lane": "compute", "name": "mlp", "start_ms": 0.0, "end_ms": 3.0},
    {"phase": "forward", "lane": "communication", "name": "dispatch", "start_ms": 0.0, "end_ms": 2.0},
]


# A pointer in the middle of the first chart (of iterations 2 to 12), and in a corner of the last map.
POINT_AT_EACH = """
for (const [each, part] of [[document.querySelector("svg"), .5], [[...document.querySelectorAll("canvas")].at(-1), .99]]) {
  const box = each.getBoundingClientRect();
  each.dispatchEvent(new PointerEvent("pointermove", {clientX: box.x + part * box.width, clientY: box.y + part * box.height}));
}
"""


def write_run(directory: Path, steps: int = 6, **start: Any) -> Path:
    """A run of two MoE layers; expert 1 of the second one gets nothing from iteration 8 on."""
    record = RecordWriter(directory)
    names = {"loss_name": "lm_loss", "unit": "tokens", "train_iters": 20}
    record.write(
        "start",
        0,
        **names,
        summary={"model": "GPT scmoe pos2"},
        parameters=1234567,
        layout={"expert": 2},
        data=EVIL,
        **start,
    )
    predicted = {"hidden": 0.97, "total_ms": 24.08, "exposed_ms": 0.5, "timeline": TIMELINE}
    where = {"layers": [0, 1], "operators": ["mlp", "attention", "shared"], "slot": [2, 3]}
    record.write("schedule", 2, text=f"experts before attention {EVIL}", **where, **predicted)
    measured = {"measured": {"overlap": True, "speedup": 1.2, "text": "a micro-batch is 1.20 × as fast"}}
    record.write("schedule", 3, text=f"experts before attention {EVIL}", **where, **predicted, **measured)
    for number in range(1, steps + 1):
        load = [[0.5, 0.5], [0.75, 0.25] if number < 4 else [1.0, 0.0]]
        record.write(
            "step",
            2 * number,
            lm_loss=5.0 - 0.1 * number,
            hidden=0.9 if number > 2 else None,
            tokens_per_second=1000.0,
            expert_load=load,
            seconds_left=90,
        )
    record.write("validation", 2 * steps, lm_loss=4.5)
    return directory


def data_of(html: str) -> Any:
    found = re.findall(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    assert len(found) == 1
    return json.loads(found[0])


def run(*arguments: Any) -> int:
    return program.main([str(each) for each in arguments])


def test_the_page_has_the_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(write_run(tmp_path / "runs" / "first")) == 0
    out = tmp_path / "runs" / "first" / "dashboard.html"
    assert capsys.readouterr().out == f"wrote {out}: open it in a browser\n"
    data = data_of(out.read_text())
    (found,) = data["runs"]
    assert (found["name"], found["iteration"], found["train_iters"], found["seconds_left"]) == ("first", 12, 20, 90)
    assert found["curves"]["loss"] == [[2, 4, 6, 8, 10, 12], [4.9, 4.8, 4.7, 4.6, 4.5, 4.4]]
    assert found["curves"]["validation"] == [[12], [4.5]]
    assert found["curves"]["hidden"] == [[6, 8, 10, 12], [0.9] * 4], "null is not drawn"
    assert found["curves"]["per_second"][1] == [1000.0] * 6 and found["curves"]["mfu"] == [[], []]
    assert found["load"]["iterations"] == [2, 4, 6, 8, 10, 12]
    first, second = found["load"]["layers"]
    assert first == {"rows": [[1.0] * 6, [1.0] * 6], "dead": []}
    assert second == {"rows": [[1.5] * 3 + [2.0] * 3, [0.5] * 3 + [0.0] * 3], "dead": [[1, 8]]}
    assert ["parameters", "1\u202f234\u202f567"] in found["facts"] and ["layout", "expert: 2"] in found["facts"]
    assert found["summary"] == [["model", "GPT scmoe pos2"]]
    (schedule,) = found["schedules"]
    assert schedule["title"] == "MoE layers 0–1, from iteration 3 on" and schedule["timeline"] == TIMELINE
    assert schedule["text"].splitlines()[1:] == [
        "dispatch ⇢ mlp → [experts 0] → attention → [experts 1] → shared ⇢ combine",
        "predicted: 97 % of the communication hidden; 24.1 ms from shortcut to join per micro-batch, forward and backward, "
        "of them 0.5 ms waiting for communication",
        "overlap on, measured: a micro-batch is 1.20 × as fast",
    ]
    assert {curve for chart in data["charts"] for curve in chart["curves"]} == found["curves"].keys()


def test_texts_of_a_record_are_no_markup_and_nothing_is_loaded(tmp_path: Path) -> None:
    class Tags(HTMLParser):
        found: list[tuple[str, dict[str, str | None]]]

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            self.found.append((tag, dict(attrs)))

    assert run(write_run(tmp_path)) == 0
    html = (tmp_path / "dashboard.html").read_text()
    tags = Tags()
    tags.found = []
    tags.feed(html)
    assert [tag for tag, _ in tags.found].count("script") == 2 and "b" not in {tag for tag, _ in tags.found}
    assert not any(
        name in ("src", "href") or name.startswith("on") for _, attributes in tags.found for name in attributes
    )
    assert "innerHTML" not in html and "@import" not in html and "url(" not in html
    assert set(re.findall(r"https?://[^\"' ]*", html)) == {"http://www.w3.org/2000/svg"}, "a name, not an address"
    assert data_of(html)["runs"][0]["schedules"][0]["text"].splitlines()[0].endswith(EVIL)


def test_long_runs_are_averaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dashboard, "MOST_POINTS", 30)
    write_run(tmp_path, steps=70)
    assert run(tmp_path) == 0
    (found,) = data_of((tmp_path / "dashboard.html").read_text())["runs"]
    iterations, losses = found["curves"]["loss"]
    assert iterations == [*range(6, 139, 6), 140], "three lines each, and the rest"
    assert losses[0] == pytest.approx(statistics.fmean([4.9, 4.8, 4.7]))
    assert found["load"]["iterations"] == [14, 28, 42, 56, 70, 84, 98, 112, 126, 140]
    assert found["load"]["layers"][1]["rows"][1] == [round(3 * 0.5 / 7, 2), *[0.0] * 9]


def test_several_runs_young_runs_and_resumed_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = write_run(tmp_path / "a" / "x"), tmp_path / "b" / "x"
    RecordWriter(second).write("start", 0, loss_name="lm_loss", unit="tokens")
    record = RecordWriter(first)
    record.write("start", 8)
    record.write("step", 10, lm_loss=1.0, expert_load=[[0.5, 0.5], [0.5, 0.5]])
    with (first / "log.jsonl").open("a") as file:
        file.write('{"kind": "step", "iteration": 12, "lm_lo')  # killed
    assert run(first, second / "log.jsonl", "--output", tmp_path / "both.html") == 0
    one, two = data_of((tmp_path / "both.html").read_text())["runs"]
    assert (one["name"], two["name"]) == ("a/x", "b/x")
    assert one["resumed"] == [8] and one["curves"]["loss"] == [[2, 4, 6, 8, 10], [4.9, 4.8, 4.7, 4.6, 1.0]]
    assert one["load"]["layers"][1]["dead"] == []
    assert two["curves"]["loss"] == [[], []] and two["load"] is None and two["iteration"] == 0


def test_what_is_no_run_is_said_in_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def error(*arguments: Any) -> str:
        assert run(*arguments) == 2
        return capsys.readouterr().err.replace(str(tmp_path), "DIR")

    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "log.jsonl").write_text('{"kind": "st')
    assert error(tmp_path) == (
        "scmoe dashboard: error: DIR has no log.jsonl: name the --save directory of a training run\n"
    )
    assert "DIR/none is not there: name" in error(tmp_path / "none")
    assert "DIR/empty has no entry of a training run in its log.jsonl" in error(tmp_path / "empty")
    RecordWriter(tmp_path / "odd").write("step", 1, expert_load=[["a", None]], lm_loss="low")
    assert "log.jsonl of DIR/odd is damaged or of another program (TypeError: " in error(tmp_path / "odd")
    assert "DIR/no/a.html cannot be written" in error(
        write_run(tmp_path / "run"), "--output", tmp_path / "no" / "a.html"
    )


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
def test_in_a_browser(tmp_path: Path) -> None:
    (tmp_path / "young").mkdir()
    RecordWriter(tmp_path / "young").write("start", 0)
    assert run(write_run(tmp_path / "run"), tmp_path / "young", "--output", tmp_path / "page.html") == 0
    pages = tmp_path / "page.html"
    pages.write_text(pages.read_text().replace("</body>", f"<script>{POINT_AT_EACH}</script></body>"))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command = [str(BROWSER), *flags, "--virtual-time-budget=2000", "--dump-dom", (tmp_path / "page.html").as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    drawn = dom.split("<script", 1)[0]
    assert re.findall("<h3>(.*?)</h3>", drawn) == [
        "Loss, nats per token",
        "Communication hidden, %",
        "Throughput, tokens/s",
        "MoE layer 0",
        "MoE layer 1",
        "MoE layers 0–1, from iteration 3 on",
    ]
    assert drawn.count("<polyline") == 4 and drawn.count("<canvas") == 2, "loss twice: training and validation"
    assert "expert 1 is dead since iteration 8" in drawn
    assert "&lt;/script&gt;&lt;b onload" in drawn and "<b onload" not in drawn
    assert "<title>mlp: 3 ms</title>" in drawn and "<title>dispatch: 2 ms</title>" in drawn
    assert "iteration 6: " in drawn and "run training 4.7" in drawn and "run validation 4.5" in drawn
    assert "iteration 12, expert 1: 0 × the mean" in drawn
    assert "12 of 20" in drawn and "2 min" in drawn and "<td>young</td>" in drawn

"""Text of others in Markdown: a parser of Markdown finds nothing in it but that text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness import tables
from benchmarks.quality import compare as quality
from scmoe_ds.analysis.markdown import code, escape, paragraph, table
from scmoe_ds.programs import analyze as analyze_program


def feasibility(directory: Path, times: Path) -> int:
    """The exit code for s.json in a directory; writes its page there as out.md."""
    files = ["--similarity", f"{directory}/s.json", "--calibration", str(times), "--output-prefix", f"{directory}/out"]
    return analyze_program.main(["feasibility", *files])


ROOT = Path(__file__).resolve().parents[2]
HOSTILE = [
    "<script>alert(1)</script>",
    "[x](javascript:alert(1))",
    "![x](http://y/z.png)",
    "a\n\n# owned",
    "# owned",
    "- item",
    "+ item",
    "* item",
    "1. item",
    "12) item",
    "> quote",
    "```\ncode",
    "~~~\ncode",
    "---",
    "===",
    "    code",
    "a `b` c",
    "``",
    "**bold**",
    "a | b",
    "a\\|b",
    "a & b",
    "R&D;",
    "\\",
    "\\[x](y)",
    "&lt;b&gt;",
    "<!-- x",
    "[ref]: http://x",
    "a\r# b",
    "\ta",
    "| a |",
    "<http://x>",
    "_a_",
    "1\\. a",
]


def parsed(text: str) -> list[Any]:
    parser = pytest.importorskip("markdown_it").MarkdownIt("commonmark").enable("table")
    return parser.parse(text)


def texts(text: str) -> list[str]:
    """The kinds of blocks, and the text of all that is inline."""
    tokens = parsed(text)
    kinds = [token.type for token in tokens if token.type.endswith("_open")]
    assert set(kinds) <= {
        "paragraph_open",
        "table_open",
        "thead_open",
        "tbody_open",
        "tr_open",
        "th_open",
        "td_open",
    }, kinds
    found = []
    for token in tokens:
        assert token.type not in ("html_block", "fence", "code_block", "hr"), token.type
        if token.type == "inline":
            children = token.children or []
            assert {child.type for child in children} <= {"text", "text_special", "em_open", "em_close"}, children
            found.append("".join(child.content for child in children))
    return found


@pytest.mark.parametrize("text", HOSTILE)
def test_text_shows_as_it_is(text: str) -> None:
    line = " ".join(text.split())
    shown = line.strip("_") if line == "_a_" else line  # emphasis is no harm, and names have underscores
    assert texts(paragraph(text)) == [shown]
    assert texts(f"Measured in {escape(text)}.") == [f"Measured in {shown}."]
    lines = table(["a", text], [[text, "b"], ["c", text]])
    assert len(lines) == 4 and texts("\n".join(lines)) == ["a", shown, shown, "b", "c", shown]


@pytest.mark.parametrize("text", [each for each in HOSTILE if each.strip()])
def test_code(text: str) -> None:
    (inline,) = [token for token in parsed(f"x {code(text)}") if token.type == "inline"]
    assert [child.type for child in inline.children] == ["text", "code_inline"]
    assert inline.children[1].content == " ".join(text.split())


def test_numbers_stay() -> None:
    assert table(["x", "y"], [["-1.5", "+2 %"]]) == ["| x | y |", "|---|---|", "| -1.5 | +2 % |"]


@pytest.mark.parametrize("text", [HOSTILE[0], HOSTILE[1], HOSTILE[3], HOSTILE[11], HOSTILE[19]])
def test_the_feasibility_page(text: str, tmp_path: Path) -> None:
    similarity = json.loads((ROOT / "benchmarks" / "results" / "analysis_similarity_scmoe.json").read_text())
    times = json.loads((ROOT / "benchmarks" / "results" / "analysis_times.json").read_text())
    similarity["model"] = text
    similarity["verdict"]["text"] = [text, "b"]
    times[0]["description"][text] = text
    (tmp_path / "s.json").write_text(json.dumps(similarity))
    (tmp_path / "t.json").write_text(json.dumps(times))
    assert feasibility(tmp_path, tmp_path / "t.json") == 0
    page = parsed((tmp_path / "out.md").read_text())
    kinds = [token.type for token in page]
    good = [token.type for token in parsed((ROOT / "benchmarks" / "results" / "analysis_feasibility.md").read_text())]
    for kind in (
        "heading_open",
        "fence",
        "table_open",
        "html_block",
        "bullet_list_open",
        "hr",
        "blockquote_open",
        "code_block",
    ):
        assert kinds.count(kind) == good.count(kind), kind
    links = [
        child for token in page for child in token.children or [] if child.type in ("link_open", "image", "html_inline")
    ]
    assert [child.type for child in links] == ["image"]


def test_tables_of_the_benchmarks() -> None:
    head = tables.head({"command": "a `b`\n# c", "environment": {"host": "<b>x</b>"}})
    assert not any("<b>" in line for line in head) and texts("\n".join(tables.table(["x"], [["<b>|"]]))) == [
        "x",
        "<b>|",
    ]


@pytest.mark.parametrize(
    "change",
    [
        {"model": 3},
        {"model": None},
        {"verdict": []},
        {"verdict": {"text": "a"}},
        {"verdict": {"text": [1]}},
        {"verdict": {"threshold": "0.8"}},
        {"verdict": {"threshold": float("nan")}},
        {"verdict": {"positions": {}}},
        {"verdict": {"positions": {"pos1": {"mean": "x"}}}},
        {"verdict": {"positions": {"pos1": {"least": float("inf")}}}},
        {"verdict": {"positions": {"pos1": {"layers": {}}}}},
        {"verdict": {"positions": {"pos1": {"layers": [{"stage": 0}]}}}},
    ],
)
def test_damaged_records_of_similarity(change: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def merge(into: Any, new: Any) -> Any:
        if isinstance(into, dict) and isinstance(new, dict) and new:
            return {**into, **{key: merge(into.get(key), value) for key, value in new.items()}}
        return new

    whole = json.loads((ROOT / "benchmarks" / "results" / "analysis_similarity_scmoe.json").read_text())
    (tmp_path / "s.json").write_text(json.dumps(merge(whole, change)))
    assert feasibility(tmp_path, ROOT / "benchmarks" / "results" / "analysis_times.json") == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and f"--similarity {tmp_path / 's.json'} is incomplete or damaged" in message


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("similarity", '{"kind": "similarity"}'),
        ("gating", '{"kind": "gating", "checkpoints": []}'),
        ("gradients", '{"kind": "gradients", "checkpoints": [null]}'),
        ("gating", '{"kind": "gating", "checkpoints": {"a": 1}}'),
        ("similarity", '{"kind": "similarity", "names": 3, "cosine": "x"}'),
        ("similarity", "[" * 100_000),
        (
            "similarity",
            '{"kind": "similarity", "names": ["a"], "cosine": [["b"]], "l2": [[1]], "model": 1, "tokens": 1, "verdict": 3}',
        ),
        ("gradients", '{"kind": "gradients", "checkpoints": [{"label": [], "iteration": {}}]}'),
        ("gating", "{"),
        ("gating", "3"),
    ],
)
def test_damaged_records_to_draw(kind: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "r.json").write_text(text)
    assert analyze_program.main([kind, "--from-json", str(tmp_path / "r.json")]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and f"--from-json {tmp_path / 'r.json'}" in message


def test_a_dollar_is_no_formula(tmp_path: Path) -> None:
    whole = json.loads((ROOT / "benchmarks" / "results" / "analysis_similarity_scmoe.json").read_text())
    (tmp_path / "r.json").write_text(json.dumps({**whole, "model": "runs/$\\frac{$"}))
    assert analyze_program.main(["similarity", "--from-json", str(tmp_path / "r.json")]) == 0


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        "3",
        "{}",
        json.dumps(
            {"benchmark": "benchmarks.quality.compare", "identity": {}, "corpus": {}, "variants": {}, "runs": [3]}
        ),
    ],
)
def test_damaged_records_of_benchmarks(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "r.json").write_text(text)
    assert quality.main(["--from-json", str(tmp_path / "r.json")]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_settings_that_extend_themselves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "s.json").write_text('{"extends": "s.json"}')
    assert quality.main(["--settings", str(tmp_path / "s.json")]) == 2
    assert f"--settings {tmp_path / 's.json'}: cannot be read" in capsys.readouterr().err

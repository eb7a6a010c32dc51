"""--help fits a screen and starts nothing; --help-all lists everything; the examples that they show are right."""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from collections.abc import Iterator

import pytest

from scmoe_ds.programs import __main__ as scmoe
from scmoe_ds.programs.flags.parser import FlagParser
from scmoe_ds.programs.flags.registry import PROGRAMS, parser_of

WITHOUT_TORCH = """
import sys
from scmoe_ds.programs.__main__ import main
codes = []
for words in (line.split() for line in sys.argv[1:]):
    try:
        main(words)
    except SystemExit as end:
        codes.append(end.code)
print(codes, sorted({"torch", "deepspeed", "transformers", "megatron"} & sys.modules.keys()), file=sys.stderr)
"""


def parsers() -> Iterator[tuple[list[str], FlagParser]]:
    """What is typed behind `scmoe`, and the parser, of all programs and of their commands."""
    for program in PROGRAMS:
        parser = parser_of(program)
        yield [program], parser
        if parser._subparsers is not None:
            for command, each in parser._subparsers._group_actions[0].choices.items():
                yield [program, command], each


ALL = {" ".join(words): parser for words, parser in parsers()}


def printed(words: list[str], capsys: pytest.CaptureFixture[str]) -> list[str]:
    with pytest.raises(SystemExit) as end:
        scmoe.main(words)
    assert end.value.code in (0, None)
    out, err = capsys.readouterr()
    assert err == ""
    return out.splitlines()


@pytest.mark.parametrize("words", ALL)
def test_help_fits_a_screen(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed([*words.split(), "--help"], capsys)
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 100
    assert all(map(str.isascii, lines)), "a terminal may know no other letters"
    assert "example:" in lines
    assert lines == printed([*words.split(), "-h"], capsys)


@pytest.mark.parametrize("words", ALL)
def test_help_all_lists_all_flags(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    parser = ALL[words]
    lines = printed([*words.split(), "--help-all"], capsys)
    assert max(map(len, lines)) <= 100
    listed = {line.split()[0] for line in lines if line.startswith("  --")}
    assert listed == {
        each.option_strings[0] for each in parser._actions if each.help != argparse.SUPPRESS and each.option_strings
    }
    assert set(parser.often) <= listed
    if parser.often:
        assert f"--help-all shows all {len(listed)} flags." in printed([*words.split(), "--help"], capsys)


@pytest.mark.parametrize("words", ALL)
def test_the_example_is_taken(words: str) -> None:
    command = shlex.split(ALL[words].example.replace("\\\n", " "))
    while command[0] in ("scmoe", "deepspeed", "--num_accelerators", "1", "2", "--module") or command[0].endswith(
        ".py"
    ):
        command.pop(0)
    if command[0].startswith("scmoe_ds."):
        assert command.pop(0) == f"scmoe_ds.programs.{PROGRAMS[words].module}"
    program = words.split()[0]
    parser_of(program).parse_args(command[1:] if command[0] == program else command)


def test_the_list_of_programs(capsys: pytest.CaptureFixture[str]) -> None:
    assert scmoe.main([]) == 2
    shown = capsys.readouterr().out
    assert scmoe.main(["--help"]) == 0
    assert capsys.readouterr().out == shown
    assert len(shown.splitlines()) <= 40
    assert max(map(len, shown.splitlines())) <= 100
    assert [line.split()[0] for line in shown.splitlines() if line.startswith("  ")] == list(PROGRAMS)


def test_help_and_wrong_flags_import_neither_torch_nor_deepspeed() -> None:
    calls = [f"{program} {flag}" for program in PROGRAMS for flag in ("--help", "--no-such-flag", "--prompt")]
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *calls], capture_output=True, text=True, check=True, timeout=120
    )
    assert run.stderr.splitlines()[-1].endswith("] []")


@pytest.mark.parametrize(
    "rank",
    [{"RANK": "1"}, {"RANK": "2", "LOCAL_RANK": "0"}, {"LOCAL_RANK": "1"}],
    ids=["rank 1", "another node", "local"],
)
def test_one_rank_prints(
    rank: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in rank.items():
        monkeypatch.setenv(name, value)
    assert printed(["pretrain", "--help"], capsys) == []
    with pytest.raises(SystemExit) as end:
        scmoe.main(["pretrain", "--num-layer", "2"])
    assert end.value.code == 2
    assert capsys.readouterr() == ("", "")


def test_flags_that_a_program_refuses_are_not_listed() -> None:
    """The images' program has no tensor parallelism, no recomputation and no monitor of gates."""
    options = ALL["pretrain-swin"]._option_string_actions
    assert not {"--tensor-model-parallel-size", "--recompute-granularity", "--log-gating-interval"} & options.keys()

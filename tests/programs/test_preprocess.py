"""scmoe preprocess: what it writes, in which order, and what it refuses."""

import gzip
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest

from scmoe_ds.data import corpus

ROOT = Path(__file__).resolve().parents[2]
EOD = 256


@pytest.fixture
def tool() -> ModuleType:
    from scmoe_ds.programs import preprocess

    return preprocess


def read_back(prefix: Path) -> list[list[int]]:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(str(prefix))
    return [dataset[i].tolist() for i in range(len(dataset))]


def write_jsonl(path: Path, records: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def flags(source: Path, prefix: Path, *more: str) -> list[str]:
    required = ["--tokenizer-type", "ByteTokenizer", "--input", str(source), "--output-prefix", str(prefix)]
    return [*required, *more]


def test_as_a_command_from_another_directory(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", [{"text": "ab"}, {"text": "ü"}])
    command = [sys.executable, "-m", "scmoe_ds.programs.preprocess", *flags(source, tmp_path / "out")]
    done = subprocess.run([*command, "--append-eod"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert read_back(tmp_path / "out_text_document") == [[97, 98, EOD], [0xC3, 0xBC, EOD]]
    assert "2 documents, 6 uint16 tokens" in done.stdout


def test_workers_do_not_change_the_output(tool: ModuleType, tmp_path: Path) -> None:
    # More documents than one block of the pool, of very different lengths, so that workers overtake.
    texts = [f"{i} " * (1 + (i * 7919) % 50 + 3000 * (i % 400 == 0)) for i in range(1500)]
    source = write_jsonl(tmp_path / "in.jsonl", [{"text": text} for text in texts])
    assert tool.main(flags(source, tmp_path / "one", "--append-eod")) == 0
    assert tool.main(flags(source, tmp_path / "two", "--append-eod", "--workers", "2")) == 0
    assert read_back(tmp_path / "one_text_document") == [[*text.encode(), EOD] for text in texts]
    for extension in ("bin", "idx"):
        one, two = (tmp_path / f"{name}_text_document.{extension}" for name in ("one", "two"))
        assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize("eod", [[EOD], []])
def test_the_bytes_are_those_of_megatrons_builder(tool: ModuleType, tmp_path: Path, eod: list[int]) -> None:
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    texts = ["ab", "\u00fc\u20ac", "x" * 70_000, "\n", "<|endoftext|>"]
    source = write_jsonl(tmp_path / "in.jsonl", [{"text": text} for text in texts])
    assert tool.main(flags(source, tmp_path / "our", *(["--append-eod"] if eod else []))) == 0
    builder = IndexedDatasetBuilder(str(tmp_path / "their.bin"), dtype=DType.optimal_dtype(257))
    for text in texts:  # Megatron-LM's preprocess_data.py hands over lists
        ids = [*text.encode(), *eod]
        builder.add_document(ids, [len(ids)])
    builder.finalize(str(tmp_path / "their.idx"))
    for extension in ("bin", "idx"):
        ours, theirs = (tmp_path / f"{name}.{extension}" for name in ("our_text_document", "their"))
        assert ours.read_bytes() == theirs.read_bytes()


def test_keys_empty_texts_and_no_eod(tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records: list[dict[str, object]] = [{"a": "x", "b": "yy"}, {"a": "", "b": "z", "c": 1}]
    source = write_jsonl(tmp_path / "in.jsonl", records)
    assert tool.main(flags(source, tmp_path / "out", "--json-keys", "a", "b")) == 0
    assert read_back(tmp_path / "out_a_document") == [[120]]
    assert read_back(tmp_path / "out_b_document") == [[121, 121], [122]]
    assert "1 empty texts left out" in capsys.readouterr().out


def test_directory_of_text_and_json_files_in_sorted_order(tool: ModuleType, tmp_path: Path) -> None:
    source = tmp_path / "texts"
    (source / "deep").mkdir(parents=True)
    (source / "b.txt").write_bytes(b"b\r\n")
    write_jsonl(source / "a.jsonl", [{"text": "1"}, {"text": "2"}])
    (source / "deep" / "c.txt").write_text("c", encoding="utf-8")
    (source / "ignored.bin").write_bytes(b"\xff")
    assert tool.main(flags(source, tmp_path / "out")) == 0
    assert read_back(tmp_path / "out_text_document") == [[49], [50], [98, 13, 10], [99]]


def test_text_files_of_other_endings_are_read_and_hidden_ones_are_not(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "code"
    (source / ".git").mkdir(parents=True)
    for name in ("a.py", "b.MD", "c.txt", "d.rst", ".git/e.py", ".f.py"):
        (source / name).write_text(name.lstrip(".git/")[0])
    prefix = tmp_path / "made" / "on the way" / "out"
    assert tool.main(flags(source, prefix, "--text-endings", ".py", "md")) == 0
    assert read_back(Path(f"{prefix}_text_document")) == [[ord(each)] for each in "abc"]
    said = capsys.readouterr()
    assert f"3 file(s) of --input {source} left out: {source}/.f.py (hidden), {source}/.git (hidden), " in said.err
    assert "--append-eod" in said.out


def test_the_tokenizer_follows_from_its_files(tool: ModuleType, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", [{"text": "ab"}])
    assert tool.main(["--input", str(source), "--output-prefix", str(tmp_path / "out")]) == 0
    assert read_back(tmp_path / "out_text_document") == [[97, 98]]
    assert tool.main(["--input", str(source), "--output-prefix", str(tmp_path / "out"), "--tokenizer-model", "x"]) == 2


def test_progress_is_told_where_no_bar_can_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "_LARGE_BYTES", 50)
    for name, count in (("a.jsonl", 9), ("b.txt", 3), ("c.jsonl.gz", 8)):
        content = b'{"text": 0}\n' * count
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    said: list[str] = []
    found = corpus.open_corpus([str(tmp_path)], (), said.append)
    with corpus.progress(found) as read:
        assert len(list(found.items(read))) == 9 + 1 + 8
    assert [int(line.split()[0]) for line in said] == sorted({int(line.split()[0]) for line in said})
    assert len(said) > 5 and said[-1].startswith("100 %")


BAD_LINES = [
    (b'{"text": "ok"}\n\n{"text": \n', "line 3: not JSON"),
    (b'{"text": "ok"}\n{"body": "x"}\n', "line 2: no key 'text'; the line has 'body'"),
    (b'{"text": "ok"}\n["x"]\n', "line 2: a JSON list"),
    (b'[{"text": "x"}]\n', "jq -c '.[]'"),
    (b'[\n{"text": "x"}\n]\n', "line 1: a JSON value over several lines"),
    (b'{\n"text": "x"\n}\n', "jq -c '.'"),
    (b'{"text": 5}\n', "line 1: 'text' is of type int"),
    (b'{"text": "\xff"}\n', "line 1: not UTF-8"),
    (b'{"text": "\\ud800"}\n', "line 1: 'text' has half of a surrogate pair"),
    (b'{"text": ""}\n', "no text under the key 'text'"),
]


@pytest.mark.parametrize(("content", "expected"), BAD_LINES)
@pytest.mark.parametrize("workers", ["1", "2"])
def test_bad_line_leaves_nothing(
    tool: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    content: bytes,
    expected: str,
    workers: str,
) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(content)
    assert tool.main(flags(source, tmp_path / "out", "--workers", workers)) == 2
    assert expected in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_one_bad_key_leaves_no_dataset_of_the_other(tool: ModuleType, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", [{"a": "x", "b": ""}])
    for keys in (["a", "b"], ["b", "a"]):
        assert tool.main(flags(source, tmp_path / "out", "--json-keys", *keys)) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_an_error_keeps_the_previous_dataset(tool: ModuleType, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", [{"text": "old"}])
    assert tool.main(flags(source, tmp_path / "out")) == 0
    source.write_text('{"text": "new"}\nbroken\n', encoding="utf-8")
    assert tool.main(flags(source, tmp_path / "out")) == 2
    assert read_back(tmp_path / "out_text_document") == [list(b"old")]


def test_bad_paths(tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", [{"text": "x"}])
    empty = tmp_path / "empty"
    empty.mkdir()
    latin = tmp_path / "latin.txt"
    latin.write_bytes(b"caf\xe9")
    wide = tmp_path / "wide.txt"
    wide.write_bytes("text".encode("utf-16"))
    table, archive = tmp_path / "t.csv", tmp_path / "a.tar.gz"
    table.touch()
    archive.touch()
    cases = [
        (flags(tmp_path / "none.jsonl", tmp_path / "out"), "none.jsonl does not exist"),
        (flags(empty, tmp_path / "out"), "holds no .jsonl"),
        (flags(source, source / "out"), "in.jsonl cannot be made (File exists)"),
        (
            flags(latin, tmp_path / "out"),
            "latin.txt is not UTF-8 (byte 3) in line 1. Convert it, e.g. with iconv -f LATIN1",
        ),
        (
            flags(wide, tmp_path / "out"),
            "wide.txt is not UTF-8 (byte 0) in line 1. Convert it, e.g. with iconv -f UTF-16",
        ),
        (flags(table, tmp_path / "out"), "t.csv is a table. Write it as JSON lines"),
        (flags(archive, tmp_path / "out"), "a.tar.gz is an archive. Unpack it"),
        (flags(latin, tmp_path / "out", "--json-keys", "body"), "whose only key is 'text'"),
    ]
    for arguments, expected in cases:
        assert tool.main(arguments) == 2
        (said,) = capsys.readouterr().err.splitlines()
        assert expected in said
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("a.tar.gz", "empty", "in.jsonl", "latin.txt", "t.csv", "wide.txt")
    ]


def test_an_unwritable_directory_is_named(
    tool: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Permissions do not stop a test that runs as root, so the system call is what refuses here.
    from megatron.core.datasets import indexed_dataset

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(indexed_dataset, "IndexedDatasetBuilder", refuse)
    source = write_jsonl(tmp_path / "in.jsonl", [{"text": "x"}])
    assert tool.main(flags(source, tmp_path / "out")) == 2
    message = capsys.readouterr().err
    assert "Permission denied" in message
    assert str(tmp_path) in message


@pytest.mark.parametrize("arguments", [["--workers", "0"], ["--tokenizer-type", "nonsense"], ["--unknown"]])
def test_bad_flags_exit_with_2(tool: ModuleType, tmp_path: Path, arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        tool.main(flags(tmp_path / "in.jsonl", tmp_path / "out", *arguments))
    assert caught.value.code == 2


def test_a_directory_of_shards(tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "shards"
    source.mkdir()
    write_jsonl(source / "s0.jsonl", [{"text": "0"}])
    (source / "s1.jsonl.gz").write_bytes(gzip.compress(b'{"text": "1"}\n'))
    write_jsonl(source / "S2.JSONL", [{"text": "2"}])
    (source / "s3.TXT.gz").write_bytes(gzip.compress(b"3"))
    for i in range(12):
        (source / f"s{i:02}.parquet").touch()
    (source / "s4.jsonl").touch()
    assert tool.main(flags(source, tmp_path / "out", "--workers", "2")) == 0
    assert read_back(tmp_path / "out_text_document") == [[ord(each)] for each in "2013"]  # sorted by path
    said = capsys.readouterr().err
    assert f"12 file(s) of --input {source} left out: {source}/s00.parquet, " in said
    assert f"{source}/s4.jsonl is empty" in said
    assert "s09.parquet, …" in said and "s10.parquet" not in said


@pytest.mark.parametrize("workers", ["1", "2"])
def test_skip_bad_counts_and_names_what_it_leaves_out(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], workers: str
) -> None:
    source = tmp_path / "in"
    source.mkdir()
    bad = [2, *range(5, 25, 2)]
    lines = ["{broken" if i in bad else json.dumps({"text": str(i)}) for i in range(1, 31)]
    (source / "a.jsonl").write_text("\n".join(lines))
    (source / "b.txt").write_bytes(b"caf\xe9")
    assert tool.main(flags(source, tmp_path / "out", "--skip-bad", "--workers", workers)) == 0
    assert read_back(tmp_path / "out_text_document") == [list(str(i).encode()) for i in range(1, 31) if i not in bad]
    said = capsys.readouterr().err.splitlines()
    start = next(i for i, line in enumerate(said) if "12 bad document(s) left out (--skip-bad)" in line)
    named = [f"  {source / 'a.jsonl'}, line {i}: not JSON" for i in bad[:10]]
    assert [line[: len(name)] for line, name in zip(said[start + 1 :], named, strict=True)] == named


def test_skip_bad_does_not_pass_over_a_damaged_stream(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = gzip.compress(b'{"text": "x"}\n' * 1000)
    (tmp_path / "a.jsonl.gz").write_bytes(content[:-4])
    assert tool.main(flags(tmp_path / "a.jsonl.gz", tmp_path / "out", "--skip-bad")) == 2
    assert "a.jsonl.gz, line 1001: cannot be read" in capsys.readouterr().err


def signal_from_worker(tool: ModuleType, monkeypatch: pytest.MonkeyPatch, number: int, to_parent: bool) -> None:
    """A worker that meets the text "now" sends a signal, to itself or to the tool, and would then take an hour."""
    encode = tool.Encoder.encode

    def send(self: Any, item: Any) -> Any:
        if b"now" in item.line:
            os.kill(os.getppid() if to_parent else os.getpid(), number)
            time.sleep(3600)
        return encode(self, item)

    monkeypatch.setattr(tool.Encoder, "encode", send)


@pytest.mark.parametrize(
    ("number", "to_parent", "code", "said"),
    [
        (signal.SIGKILL, False, 2, "error: a worker process was killed, most likely because memory ran out"),
        (signal.SIGTERM, True, 128 + 15, "ended by SIGTERM"),
        (signal.SIGINT, True, 128 + 2, "ended by SIGINT"),
    ],
)
def test_signals_end_the_run_and_leave_nothing(
    tool: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    to_parent: bool,
    code: int,
    said: str,
) -> None:
    signal_from_worker(tool, monkeypatch, number, to_parent)
    source = write_jsonl(tmp_path / "in.jsonl", [{"text": "now" if i == 1500 else "x" * 500} for i in range(3000)])
    before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    started = time.monotonic()
    assert tool.main(flags(source, tmp_path / "out", "--workers", "2")) == code
    assert time.monotonic() - started < 30
    assert said in capsys.readouterr().err.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]
    for child in multiprocessing.active_children():
        child.join(10)
    assert not multiprocessing.active_children()
    assert {each: signal.getsignal(each) for each in before} == before


def test_files_of_a_killed_run_are_named(tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", [{"text": "x"}])
    (tmp_path / "o[1]_text_document.0123.tmp.bin").touch()
    (tmp_path / "o1_text_document.0123.tmp.bin").touch()
    assert tool.main(flags(source, tmp_path / "o[1]")) == 0
    said = capsys.readouterr().err.splitlines()[0]
    assert said.endswith(f"or is still at work: {tmp_path}/o[1]_text_document.0123.tmp.bin")
    assert read_back(tmp_path / "o[1]_text_document") == [[120]]


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (PermissionError(13, "Permission denied", "in.jsonl"), 2, "in.jsonl: Permission denied; correct the path or"),
        (OSError(5, "Input/output error", "in.jsonl"), 1, "Input/output error"),
    ],
)
def test_a_file_that_cannot_be_read(
    error: OSError,
    code: int,
    said: str,
    tool: ModuleType,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tool, "open_corpus", mock.Mock(side_effect=error))
    assert tool.main(["--input", "in.jsonl", "--output-prefix", "out"]) == code
    assert said in capsys.readouterr().err


def test_a_full_disk_leaves_nothing(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    class Full(IndexedDatasetBuilder):
        def add_document(self, *args: Any, **kwargs: Any) -> None:
            super().add_document(*args, **kwargs)
            self.data_file.flush()
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("megatron.core.datasets.indexed_dataset.IndexedDatasetBuilder", Full)
    source = write_jsonl(tmp_path / "in.jsonl", [{"text": "x"}])
    assert tool.main(flags(source, tmp_path / "out")) == 2
    assert f"cannot write {tmp_path}/out_text_document.bin and .idx: No space left" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]

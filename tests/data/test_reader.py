"""Text files as people have them: compressed, damaged, with a byte-order mark, with lines that are no documents."""

import bz2
import gzip
import importlib
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scmoe_ds.data import reader, text_file
from scmoe_ds.data.reader import BadDocumentError, find_files, parse_line, read_document, read_lines
from scmoe_ds.data.text_file import read_text
from scmoe_ds.data.tokenizer import ByteTokenizer
from scmoe_ds.errors import DataError

LINES = [f'{{"text": "{"é" * (i % 40)}{i}"}}\n'.encode() for i in range(5000)]


def zstd(content: bytes) -> bytes:
    package = pytest.importorskip("zstandard")
    return bytes(package.ZstdCompressor().compress(content))


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": zstd,
}


@pytest.mark.parametrize("how", COMPRESS)
def test_compressed_files_are_read_whatever_their_name(tmp_path: Path, how: str) -> None:
    """In two parts, as parallel compressors write them."""
    compress = COMPRESS[how]
    content = compress(b"".join(LINES[:2000])) + compress(b"".join(LINES[2000:]))
    for name in (f"a.jsonl.{how}", "plain.jsonl"):
        (tmp_path / name).write_bytes(content)
        assert list(read_lines(tmp_path / name)) == list(enumerate(LINES, start=1))
    assert read_document(tmp_path / "plain.jsonl") == b"".join(LINES).decode()
    for piece in (1 << 20, 7):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(text_file, "_PIECE_BYTES", piece)
            assert read_text(str(tmp_path / "plain.jsonl"), ByteTokenizer(), 257).tokens.tobytes() == b"".join(LINES)


@pytest.mark.parametrize("how", COMPRESS)
def test_a_stream_that_is_cut_short_or_damaged_names_file_and_line(tmp_path: Path, how: str) -> None:
    whole = COMPRESS[how](b"".join(LINES))
    path = tmp_path / "a.jsonl"
    for content in (whole[:-20], whole[: len(whole) // 2], whole[: len(whole) // 2] + b"\xff" * 400):
        path.write_bytes(content)
        seen = 0
        with pytest.raises(
            DataError, match=r"a\.jsonl, line (\d+): cannot be read \(.+\)\. Copy the file again"
        ) as caught:
            for seen, line in read_lines(path):
                assert line == LINES[seen - 1] or content.endswith(b"\xff"), "what was read before the end is right"
        assert f"line {seen + 1}:" in str(caught.value)
        assert not isinstance(caught.value, BadDocumentError), "--skip-bad cannot know how much is lost"
        with pytest.raises(
            DataError, match=r"--text-file \S+ cannot be read as UTF-8 text: .+ (\(in line \d+\)|byte at byte \d+)$"
        ):
            read_text(str(path), ByteTokenizer(), 257)


def test_zstd_without_a_package_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl.zst").write_bytes(b"\x28\xb5\x2f\xfd\x04\x00")
    imported = importlib.import_module

    def without(name: str) -> Any:
        if name in ("compression.zstd", "zstandard"):
            raise ImportError(name)
        return imported(name)

    monkeypatch.setattr(reader.importlib, "import_module", without)
    with pytest.raises(
        DataError, match=r"a\.jsonl\.zst is compressed with zstd, .*: pip install zstandard, or .*zstd -d"
    ):
        list(read_lines(tmp_path / "a.jsonl.zst"))


def test_files_of_a_directory_are_found_or_named(tmp_path: Path) -> None:
    read = ["a.jsonl", "B.JSONL", "c.json.gz", "D.Jsonl.GZ", "sub/e.txt.zst", "sub/F.TXT"]
    left_out = ["a.jsonl.gz", "g.csv", "sub/README", "h.jsonl.7z"]
    for name in [*read, *left_out]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "dangling.jsonl").symlink_to("nothing")
    (tmp_path / "elsewhere").symlink_to(tmp_path / "sub", target_is_directory=True)
    found = find_files(tmp_path)
    assert found.files == sorted(tmp_path / name for name in read)
    reasons = {
        "a.jsonl.gz": " (a.jsonl is there too)",
        "dangling.jsonl": " (a link to nothing)",
        "elsewhere": " (a link to a directory)",
    }
    names = [*left_out, "dangling.jsonl", "elsewhere"]
    assert found.left_out == sorted(f"{tmp_path / name}{reasons.get(name, '')}" for name in names)


def test_byte_order_marks_and_odd_characters(tmp_path: Path) -> None:
    mark, content = b"\xef\xbb\xbf", b'{"text": "a\\u0000b\\u2028"}'
    path = tmp_path / "a.txt"
    for body in (mark + content, gzip.compress(mark + content)):
        path.write_bytes(body)
        assert read_document(path) == content.decode()
        assert [parse_line(path, *line, ["text"]) for line in read_lines(path)] == [{"text": "a\0b\u2028"}]
        found = read_text(str(path), ByteTokenizer(), 257)
        assert (found.tokens.tobytes(), found.num_bytes) == (content, len(content))
    path.write_bytes(b"")
    assert (read_document(path), list(read_lines(path))) == ("", [])


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b'{"text": "a", "n": ' + b"9" * 5000 + b"}", "a number is too long"),
        (b'{"text": "a", "m": ' + b"[" * 3000 + b"]" * 3000 + b"}", "nested more deeply"),
        (b'{"text": "a", "m": ' + b'{"k":' * 100_000 + b"1" + b"}" * 100_001, "nested more deeply"),
        (b'{"text": "a\0b"}', "not JSON"),
        (b"\0" * 100, "not JSON"),
        ("{}".encode("utf-16"), "not UTF-8"),
        (b'{"text": ["a"]}', "'text' is of type list"),
        (b'{"text": null}', "'text' is of type NoneType"),
        (b'{"text": "\\udc80"}', "'text' has half of a surrogate pair"),
        (b"3", "a JSON int"),
    ],
)
def test_bad_lines_name_file_and_line(line: bytes, expected: str) -> None:
    with pytest.raises(BadDocumentError, match=rf"^x\.jsonl, line 7: {expected}"):
        parse_line("x.jsonl", 7, line, ["text"])


def test_long_lines_work_up_to_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "x" * 5_000_000}) + "\n" + json.dumps({"text": "y"}))
    assert [len(parse_line(path, *line, ["text"])["text"]) for line in read_lines(path)] == [5_000_000, 1]
    monkeypatch.setattr(reader, "MOST_BYTES", 1 << 20)
    with pytest.raises(DataError, match=r"a\.jsonl, line 1: longer than 1 MiB"):
        list(read_lines(path))
    path.write_text("short\n" * 200_000)
    with pytest.raises(DataError, match=r"a\.jsonl is longer than 1 MiB, and one document"):
        read_document(path)

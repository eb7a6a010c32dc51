"""Datasets: what is written, refused, sampled and batched, against plain Python."""

import collections
import hashlib
import json
import math
import random
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from scmoe_ds.data import default_corpus, indexed, sequences
from scmoe_ds.data.dataset import DataSettings, build_datasets
from scmoe_ds.data.default_corpus import prepare_default_corpus, standard_library_documents
from scmoe_ds.data.indexed import check_token_range, read_layout
from scmoe_ds.data.indexed_writer import IndexedDatasetWriter, write_indexed_dataset
from scmoe_ds.data.sampler import PretrainingSampler, pretraining_batches
from scmoe_ds.data.sequences import Sequences, unigram_entropy
from scmoe_ds.data.splits import parse_data_path, split_ranges
from scmoe_ds.data.text_file import read_text
from scmoe_ds.data.tokenizer import ByteTokenizer, Tokenizer
from scmoe_ds.errors import DataError

ROOT = Path(__file__).resolve().parents[2]
SEQ = 8


def check_indexed_dataset(prefix: str, vocab_size: int) -> None:
    check_token_range(read_layout(prefix), vocab_size)


def make_documents(count: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(256) for _ in range(rng.randint(1, 60))] + [256] for _ in range(count)]


@pytest.fixture
def documents() -> list[list[int]]:
    return make_documents(40)


@pytest.fixture
def prefix(tmp_path: Path, documents: list[list[int]]) -> str:
    return write_indexed_dataset(str(tmp_path / "data"), documents, 257).prefix


def settings_for(*data_path: str, **changes: object) -> DataSettings:
    base = DataSettings(data_path, split="8,1,1", seq_length=SEQ, seed=5, tokenizer=ByteTokenizer())
    return replace(base, **changes)  # type: ignore[arg-type]


def build(settings: DataSettings, *samples: int) -> Any:
    """``build_datasets`` without the None in its types: the tests know which datasets they asked for."""
    return build_datasets(settings, *samples)


# ---------------------------------------------------------------- writing


@pytest.mark.parametrize(("vocab_size", "dtype"), [(257, "uint16"), (65499, "uint16"), (65500, "int32")])
def test_write_and_read_back(tmp_path: Path, vocab_size: int, dtype: str) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    documents: list[Any] = [[1, 2, vocab_size - 1], np.array([0]), [5] * 100]
    summary = write_indexed_dataset(str(tmp_path / "data"), documents, vocab_size)
    assert (summary.num_documents, summary.num_tokens, summary.dtype) == (3, 104, dtype)
    dataset = IndexedDataset(summary.prefix)
    assert [dataset[i].tolist() for i in range(len(dataset))] == [list(document) for document in documents]
    assert dataset[0].dtype == dtype
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.bin", "data.idx"]


@pytest.mark.parametrize(
    ("refused", "expected"),
    [
        ([[1], []], "document 1 of .* is empty"),
        ([[1], [2, 257]], r"document 1 of .* token id 257, outside 0\.\.256"),
        ([[-1]], "token id -1"),
        ([], "no document"),
    ],
)
def test_a_failed_write_leaves_the_previous_dataset(prefix: str, refused: list[list[int]], expected: str) -> None:
    before = {path.name: path.read_bytes() for path in Path(prefix).parent.iterdir()}
    with pytest.raises(DataError, match=expected):
        write_indexed_dataset(prefix, refused, 257)
    assert {path.name: path.read_bytes() for path in Path(prefix).parent.iterdir()} == before


def test_nothing_is_visible_before_the_end(tmp_path: Path) -> None:
    with IndexedDatasetWriter(str(tmp_path / "data"), 257) as writer:
        writer.add([1, 2, 3])
        assert not {"data.bin", "data.idx"} & {path.name for path in tmp_path.iterdir()}
    check_indexed_dataset(str(tmp_path / "data"), 257)


def test_write_into_a_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="must exist and be writable"):
        write_indexed_dataset(str(tmp_path / "no" / "data"), [[1]], 257)


# ---------------------------------------------------------------- default corpus and entropy


@pytest.fixture
def small_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for the interpreter's library, with one file of every kind that is left out."""
    root = tmp_path / "lib"
    files = {
        "b.py": b"b = 1\r\n",
        "a.py": "a = 'ü'\n".encode(),
        "pkg/c.py": b"c = 3\n",
        "pkg/latin.py": b"# caf\xe9\n",
        "pkg/empty.py": b"",
        "pkg/notes.txt": b"no",
        "_sysconfigdata__x.py": b"no",
        "sitecustomize.py": b"no",
        **{f"{name}/x.py": b"no" for name in ("test", "pkg/tests", "site-packages", "encodings")},
    }
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    monkeypatch.setattr(default_corpus.sysconfig, "get_path", lambda name: str(root))
    return root


def test_library_documents(small_library: Path) -> None:
    expected = [("a.py", "a = 'ü'\n"), ("b.py", "b = 1\r\n"), ("pkg/c.py", "c = 3\n")]
    assert list(standard_library_documents()) == expected


def test_library_without_sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(default_corpus.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(DataError, match=r"no \.py files"):
        list(standard_library_documents())


def test_this_interpreters_library_is_a_corpus_of_several_megabytes() -> None:
    documents = dict(standard_library_documents())
    assert "argparse.py" in documents
    assert 5e6 < sum(map(len, documents.values())) < 30e6


def test_default_corpus_is_reused_until_it_is_not_current(small_library: Path, tmp_path: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    directory = tmp_path / "new" / "corpus"
    prefix = prepare_default_corpus(directory)
    check_indexed_dataset(prefix, 257)
    dataset = IndexedDataset(prefix)
    written = sorted(bytes(dataset[i][:-1].tolist()) for i in range(len(dataset)))
    assert written == sorted(["a = 'ü'\n".encode(), b"b = 1\r\n", b"c = 3\n"])
    assert all(dataset[i][-1] == 256 for i in range(3))
    inode = Path(prefix + ".bin").stat().st_ino
    assert prepare_default_corpus(directory) == prefix
    assert Path(prefix + ".bin").stat().st_ino == inode

    content = Path(prefix + ".bin").read_bytes()
    Path(prefix + ".bin").write_bytes(content[:-2])
    prepare_default_corpus(directory)
    assert Path(prefix + ".bin").read_bytes() == content  # damaged: written again, and the same
    for extension in (".bin", ".idx"):
        whole = Path(prefix + extension).read_bytes()
        Path(prefix + extension).write_bytes(whole[:40] + bytes([whole[40] ^ 1]) + whole[41:])
        prepare_default_corpus(directory)
        assert Path(prefix + extension).read_bytes() == whole

    record = json.loads(Path(prefix + ".json").read_text(encoding="utf-8"))
    Path(prefix + ".json").write_text(json.dumps({**record, "python": "2.7"}), encoding="utf-8")
    (small_library / "d.py").write_bytes(b"d")
    prepare_default_corpus(directory)
    assert len(IndexedDataset(prefix)) == 4
    assert len(list(directory.iterdir())) == 3


def test_documents_are_shuffled_alike_every_time(small_library: Path, tmp_path: Path) -> None:
    for i in range(50):
        (small_library / f"m{i:02}.py").write_text(f"{i:02}", encoding="utf-8")
    one, two = (Path(prepare_default_corpus(tmp_path / name) + ".bin").read_bytes() for name in "xy")
    assert one == two
    tokens = np.frombuffer(one, dtype=np.uint16)
    text = "".join("|" if token == 256 else chr(token) for token in tokens)
    numbers = [part for part in text.split("|") if part.isdigit()]
    assert len(numbers) == 50
    assert numbers != sorted(numbers)


def entropy(documents: list[list[int]]) -> float:
    counts = collections.Counter(token for document in documents for token in document)
    total = sum(counts.values())
    return -sum(n / total * math.log(n / total) for n in counts.values())


def test_unigram_entropy(prefix: str, documents: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = Sequences(prefix)
    everything = range(len(documents))
    assert unigram_entropy(dataset, everything) == pytest.approx(entropy(documents), abs=1e-12)
    monkeypatch.setattr(sequences, "_ENTROPY_BLOCK_TOKENS", 100)  # several blocks
    assert unigram_entropy(dataset, everything) == pytest.approx(entropy(documents), abs=1e-12)
    assert unigram_entropy(dataset, range(3, 9)) == pytest.approx(entropy(documents[3:9]), abs=1e-12)
    with pytest.raises(DataError, match="no tokens"):
        unigram_entropy(dataset, range(0))


# ---------------------------------------------------------------- refusing damaged datasets


def test_a_whole_dataset_passes(prefix: str) -> None:
    check_indexed_dataset(prefix, 257)


@pytest.mark.parametrize("extension", [".bin", ".idx"])
def test_missing_file(prefix: str, extension: str) -> None:
    Path(prefix + extension).unlink()
    with pytest.raises(DataError, match=rf"data\{extension} not found"):
        check_indexed_dataset(prefix, 257)


def test_prefix_with_extension(prefix: str) -> None:
    with pytest.raises(DataError, match=f"Give the path without extension: {prefix}, or"):
        check_indexed_dataset(prefix + ".bin", 257)


def edit(path: str, offset: int, content: bytes) -> None:
    with open(path, "r+b") as stream:
        stream.seek(offset)
        stream.write(content)


# Offsets in the .idx: magic 0, version 9, dtype 17, counts 18 and 26, lengths 34.
@pytest.mark.parametrize(
    ("offset", "content", "expected"),
    [
        (0, b"PK\x03\x04", "not the index of a Megatron dataset"),
        (0, b"TNTIDX\0\0", "of an old format .* --dataset-impl mmap"),
        (9, struct.pack("<Q", 2), "index version 2"),
        (17, b"\x06", "dtype code 6"),
        (17, b"\x04", "contradicts itself"),  # tokens of 4 bytes, offsets for tokens of 2
        (18, struct.pack("<Q", 41), "truncated"),
        (18, struct.pack("<Q", 39), "longer than its own header says"),
        (34, struct.pack("<i", -5), "contradicts itself"),
        (34, struct.pack("<i", 1), "contradicts itself"),
    ],
)
def test_damaged_index(prefix: str, offset: int, content: bytes, expected: str) -> None:
    edit(prefix + ".idx", offset, content)
    with pytest.raises(DataError, match=expected) as caught:
        check_indexed_dataset(prefix, 257)
    assert prefix + ".idx" in str(caught.value)


@pytest.mark.parametrize("kept", [0, 4, 20, 33, 34, 100, -1])
def test_truncated_index(prefix: str, kept: int) -> None:
    content = Path(prefix + ".idx").read_bytes()
    Path(prefix + ".idx").write_bytes(content[:kept])
    with pytest.raises(DataError, match=r"data\.idx is (truncated|not the index)"):
        check_indexed_dataset(prefix, 257)


@pytest.mark.parametrize("change", [-2, -1, 2])
def test_bin_of_another_size(prefix: str, documents: list[list[int]], change: int) -> None:
    size = 2 * sum(map(len, documents))
    content = Path(prefix + ".bin").read_bytes() + b"\0\0"
    Path(prefix + ".bin").write_bytes(content[: size + change])
    with pytest.raises(DataError, match=rf"data\.bin has {size + change} bytes, but .* describes {size}"):
        check_indexed_dataset(prefix, 257)


@pytest.mark.parametrize("lengths", [[], [0, 0]])
def test_empty_dataset(tmp_path: Path, lengths: list[int]) -> None:
    n = len(lengths)
    header = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, n, n + 1)
    body = struct.pack(f"<{n}i{n}q{n + 1}q", *lengths, *lengths, *range(n + 1))
    (tmp_path / "data.idx").write_bytes(header + body)
    (tmp_path / "data.bin").write_bytes(b"")
    with pytest.raises(DataError, match="no documents" if n == 0 else "all empty"):
        check_indexed_dataset(str(tmp_path / "data"), 257)


def test_vocabulary_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexed, "_SCAN_BLOCK_TOKENS", 4)
    prefix = write_indexed_dataset(str(tmp_path / "data"), [[1, 2, 3], [4, 5], [99, 6, 7]], 100).prefix
    check_indexed_dataset(prefix, 100)
    with pytest.raises(DataError, match=r"data\.bin holds token id 99 \(document 2\).*--tokenizer-type"):
        check_indexed_dataset(prefix, 99)


def test_negative_token(tmp_path: Path) -> None:
    prefix = write_indexed_dataset(str(tmp_path / "data"), [[1, 2, 3]], 70000).prefix
    edit(prefix + ".bin", 4, struct.pack("<i", -7))
    with pytest.raises(DataError, match="token id -7"):
        check_indexed_dataset(prefix, 70000)


def test_a_huge_dataset_is_sampled_at_both_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexed, "_SCAN_BLOCK_TOKENS", 4)
    monkeypatch.setattr(indexed, "_FULL_SCAN_TOKENS", 999)
    for position, found in ((0, True), (999, True), (35, False)):  # 35 lies between two sampled blocks
        tokens = np.zeros(1000, dtype=np.int64)
        tokens[position] = 50
        prefix = write_indexed_dataset(str(tmp_path / "data"), [tokens], 100).prefix
        if found:
            with pytest.raises(DataError, match="token id 50"):
                check_indexed_dataset(prefix, 50)
        else:
            check_indexed_dataset(prefix, 50)


# ---------------------------------------------------------------- --data-path and --split


@pytest.mark.parametrize(
    ("data_path", "expected"),
    [
        (["a"], (["a"], None)),
        (["a", "b"], (["a", "b"], None)),
        (["a", "b", "c"], (["a", "b", "c"], None)),
        (["0.3", "a", "7", "b"], (["a", "b"], [0.3, 7.0])),
        (["./7"], (["./7"], None)),
    ],
)
def test_parse_data_path(data_path: list[str], expected: object) -> None:
    assert parse_data_path(data_path) == expected


@pytest.mark.parametrize(
    ("data_path", "expected"),
    [
        ([], "is empty"),
        (["a", " "], "is empty"),
        (["0.3", "a", "b"], "mixes"),
        (["a", "0.3", "b", "0.7"], "mixes"),
        (["0.3", "a", "b", "c"], "mixes"),
        (["1", "2"], "mixes"),
        (["7"], "mixes"),
        (["0", "a", "1", "b"], "weight 0:"),
        (["-1", "a", "1", "b"], "weight -1:"),
        (["nan", "a", "1", "b"], "weight nan:"),
        (["inf", "a", "1", "b"], "weight inf:"),
    ],
)
def test_bad_data_path(data_path: list[str], expected: str) -> None:
    with pytest.raises(DataError, match=expected):
        parse_data_path(data_path)


@pytest.mark.parametrize(
    ("split", "count", "expected"),
    [
        ("969,30,1", 1000, (range(969), range(969, 999), range(999, 1000))),
        ("8,1,1", 40, (range(32), range(32, 36), range(36, 40))),
        ("100,0,0", 7, (range(7), range(0), range(0))),
        ("1, 1", 4, (range(2), range(2, 4), range(0))),
        ("1,1e-3", 1001, (range(1000), range(1000, 1001), range(0))),
    ],
)
def test_split(split: str, count: int, expected: tuple[range, range, range]) -> None:
    assert split_ranges(split, count) == expected


@pytest.mark.parametrize("split", ["", "a,b", "1,-1", "0,0,0", "1,1,1,1", "nan,1", "1,,1"])
def test_bad_split(split: str) -> None:
    with pytest.raises(DataError, match="is not a split"):
        split_ranges(split, 10)


# ---------------------------------------------------------------- building


def plain_samples(documents: list[list[int]], order: list[int]) -> list[list[int]]:
    """Sequences of SEQ + 1 tokens, each starting at the last token of the one before."""
    stream = [token for index in order for token in documents[index]]
    return [stream[i : i + SEQ + 1] for i in range(0, len(stream) - SEQ, SEQ)]


def test_samples_are_the_concatenated_documents(prefix: str, documents: list[list[int]]) -> None:
    datasets = build(settings_for(prefix), 500, 20, 20)
    ranges = split_ranges("8,1,1", len(documents))
    requested = (500, 20, 20)
    for dataset, split, samples in zip((datasets.train, datasets.valid, datasets.test), ranges, requested, strict=True):
        assert len(dataset) >= samples
        order = dataset.document_index.tolist()
        visits = collections.Counter(order)  # every document of the split, and no other, once an epoch
        assert set(visits) == set(split)
        assert len(set(visits.values())) == 1
        expected = plain_samples(documents, order)
        shuffled = [expected[i] for i in dataset.shuffle_index]
        assert sorted(dataset.shuffle_index.tolist()) == list(range(len(expected)))
        for i, sample in enumerate(shuffled):
            assert dataset[i]["tokens"].tolist() == sample[:-1]
            assert dataset[i]["labels"].tolist() == sample[1:]
            assert dataset[i]["loss_mask"].tolist() == [1.0] * SEQ
    again = build(settings_for(prefix), 500, 0, 0)
    assert (again.valid, again.test) == (None, None)
    assert build(settings_for(prefix), 0, 0, 0).train is None


def test_seed_changes_the_order_and_the_cache_does_not(prefix: str) -> None:
    def first(seed: int) -> list[int]:
        return build(settings_for(prefix, seed=seed), 50, 0, 0).train[0]["tokens"].tolist()

    fresh = first(1)
    assert first(1) == fresh
    assert first(2) != fresh


def test_end_of_document_loss_mask(prefix: str) -> None:
    train = build(settings_for(prefix, eod_mask_loss=True), 100, 0, 0).train
    for i in range(100):
        expected = [0.0 if token == 256 else 1.0 for token in train[i]["tokens"].tolist()]
        assert train[i]["loss_mask"].tolist() == expected


@pytest.mark.parametrize("cached", [False, True])
def test_a_rewritten_dataset_is_not_read_through_its_old_indices(tmp_path: Path, cached: bool) -> None:
    changes = {"data_cache_path": str(tmp_path / "cache")} if cached else {}
    for seed, count in ((1, 40), (2, 30)):
        documents = make_documents(count, seed)
        prefix = write_indexed_dataset(str(tmp_path / "data"), documents, 257).prefix
        train = build(settings_for(prefix, split="1", **changes), 20, 0, 0).train
        expected = plain_samples(documents, train.document_index.tolist())
        assert train[0]["tokens"].tolist() == expected[train.shuffle_index[0]][:-1]
        assert len(train) == len(expected)
    assert (tmp_path / "cache").exists() == cached


@pytest.mark.parametrize("cached", [False, True])
def test_blend_in_one_process(tmp_path: Path, cached: bool) -> None:
    """No process group: the weights hold, and without weights the tokens of each dataset are its weight."""
    for name, token, length in (("a", 1, 90), ("b", 2, 30)):
        write_indexed_dataset(str(tmp_path / name), [[token] * length] * 10, 257)
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    changes = {"data_cache_path": str(tmp_path / "cache")} if cached else {}
    for data_path, share in (((a, b), 0.75), (("1", a, "3", b), 0.25)):
        # 1000 samples are several times the 120 of one epoch
        train = build(settings_for(*data_path, **changes), 1000, 10, 0).train
        drawn = collections.Counter(int(train[i]["tokens"][0]) for i in range(1000))
        assert drawn[1] / 1000 == pytest.approx(share, abs=0.01)
    loader = pretraining_batches(train, micro_batch_size=2, data_parallel_rank=0, data_parallel_size=1)
    assert set(next(iter(loader))) == {"tokens", "labels", "loss_mask"}


def test_a_blend_dominated_by_one_of_many_datasets(tmp_path: Path) -> None:
    """Eleven small shares are each rounded up to one sample, which makes the blend draw 305 from the large
    dataset. Its one epoch holds 299, just what megatron-core's own margin of 0.5 % over 297 asks for."""
    data_path: list[str] = []
    for i in range(12):
        tokens = [[1] * (299 * SEQ + 1)] if i == 0 else make_documents(20, i)
        prefix = write_indexed_dataset(str(tmp_path / f"d{i}"), tokens, 257).prefix
        data_path += ["1000" if i == 0 else "1", prefix]
    assert len(build(settings_for(*data_path, split="1"), 300, 0, 0).train) >= 300


def test_one_weighted_prefix_is_that_prefix(prefix: str) -> None:
    plain = build(settings_for(prefix), 50, 0, 0).train
    weighted = build(settings_for("0.5", prefix), 50, 0, 0).train
    assert [plain[i]["tokens"].tolist() for i in range(50)] == [weighted[i]["tokens"].tolist() for i in range(50)]


def test_split_shorter_than_a_sequence(tmp_path: Path) -> None:
    prefix = write_indexed_dataset(str(tmp_path / "data"), [[1] * SEQ] * 9 + [[1] * (SEQ + 1)], 257).prefix
    assert build(settings_for(prefix, split="0,0,1"), 0, 0, 5).test is not None
    message = rf"the valid split .* 1 of 10 documents with {SEQ} tokens.*takes {SEQ + 1}"
    with pytest.raises(DataError, match=message):
        build(settings_for(prefix), 5, 1, 1)
    # Without a request the short split does not matter, nor does an empty one (megatron-core would loop).
    assert len(build(settings_for(prefix), 5, 0, 1).test) >= 1
    assert len(build(settings_for(prefix, split="969,30,1"), 5, 0, 0).train) >= 5


@pytest.mark.parametrize("change", [{"seq_length": 0}, {"seed": -1}, {"seed": 2**32}, {"split": "x"}])
def test_bad_settings(prefix: str, change: dict[str, object]) -> None:
    with pytest.raises(DataError, match="--s"):
        build(settings_for(prefix, **change), 5, 0, 0)


def test_build_refuses_damaged_data_and_an_unwritable_cache(prefix: str) -> None:
    with pytest.raises(DataError, match="--data-cache-path"):
        build(settings_for(prefix, data_cache_path=prefix + ".bin"), 5, 0, 0)
    edit(prefix + ".bin", 0, struct.pack("<H", 300))
    with pytest.raises(DataError, match="token id 300"):
        build(settings_for(prefix), 5, 0, 0)


# ---------------------------------------------------------------- batches


class Numbers(torch.utils.data.Dataset):
    """Sample i is filled with i."""

    def __len__(self) -> int:
        return 23

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = torch.full((SEQ,), index)
        return {"tokens": tokens, "labels": tokens + 1, "loss_mask": torch.ones(SEQ), "position_ids": tokens}


def micro_batches(rank: int, size: int, consumed: int = 0, workers: int = 0) -> list[list[int]]:
    loader = pretraining_batches(
        Numbers(),
        micro_batch_size=2,
        data_parallel_rank=rank,
        data_parallel_size=size,
        consumed_samples=consumed,
        num_workers=workers,
    )
    batches = list(loader)
    assert len(batches) == len(loader)
    return [batch["tokens"][:, 0].tolist() for batch in batches]


def test_two_ranks_and_two_accumulated_micro_batches_agree() -> None:
    alone = micro_batches(0, 1)
    assert alone == [[2 * g, 2 * g + 1] for g in range(11)]
    ranks = [micro_batches(rank, 2) for rank in range(2)]
    assert [batch for pair in zip(*ranks, strict=True) for batch in pair] == alone[:10]


def test_resume_on_another_number_of_ranks() -> None:
    before = [micro_batches(rank, 3)[0] for rank in range(3)]  # one step: 6 samples
    after = [micro_batches(rank, 2, consumed=6) for rank in range(2)]
    seen = before + [batch for pair in zip(*after, strict=True) for batch in pair]
    assert [sample for batch in seen for sample in batch] == list(range(22))


def test_workers_keep_the_order() -> None:
    assert micro_batches(1, 2, workers=2) == micro_batches(1, 2)


def test_batch_contents() -> None:
    loader = pretraining_batches(Numbers(), micro_batch_size=3, data_parallel_rank=0, data_parallel_size=1)
    batch = next(iter(loader))
    assert {key: (value.dtype, tuple(value.shape)) for key, value in batch.items()} == {
        "tokens": (torch.int64, (3, SEQ)),
        "labels": (torch.int64, (3, SEQ)),
        "loss_mask": (torch.float32, (3, SEQ)),
    }
    assert torch.equal(batch["labels"], batch["tokens"] + 1)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"micro_batch_size": 0}, "train_micro_batch_size_per_gpu is 0"),
        ({"data_parallel_rank": 2}, r"rank 2 is outside 0\.\.1"),
        ({"data_parallel_rank": -1}, "rank -1 is outside"),
        ({"consumed_samples": 24}, "24 samples are already consumed, but the dataset has 23"),
        ({"consumed_samples": -1}, "-1 samples"),
    ],
)
def test_asking_for_too_much(changes: dict[str, int], expected: str) -> None:
    arguments = {"micro_batch_size": 2, "data_parallel_rank": 0, "data_parallel_size": 2, **changes}
    with pytest.raises(DataError, match=expected):
        pretraining_batches(Numbers(), **arguments)  # type: ignore[arg-type]


def test_everything_consumed_is_an_empty_loader() -> None:
    sampler = PretrainingSampler(8, micro_batch_size=2, data_parallel_rank=0, data_parallel_size=1, consumed_samples=8)
    assert (len(sampler), list(sampler)) == (0, [])


# ---------------------------------------------------------------- several processes

# Both ranks are forked from one fresh process: importing megatron-core takes longer than the test, and
# the process that runs pytest may by now hold threads or a GPU, which do not survive a fork.
PROGRAM = """
import json, multiprocessing, sys, warnings
warnings.simplefilter("ignore")
import torch.distributed as dist
from scmoe_ds.data.dataset import DataSettings, build_datasets
from scmoe_ds.data.sampler import pretraining_batches
from scmoe_ds.errors import DataError
from scmoe_ds.data.tokenizer import ByteTokenizer

directory, a, b = sys.argv[1:]

def build(*data_path, seed=5, cache=directory + "/cache"):
    return build_datasets(DataSettings(data_path, "8,1,1", 8, seed, ByteTokenizer(), cache), 60, 4, 4)

def tokens(rank, datasets):
    loader = pretraining_batches(
        datasets.train, micro_batch_size=2, data_parallel_rank=rank, data_parallel_size=2
    )
    return [batch["tokens"].tolist() for batch in loader][:12]

def refusal(*data_path, **changes):
    try:
        build(*data_path, **changes)
    except ValueError as error:
        return str(error)

def run(rank):
    dist.init_process_group("gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=2)
    result = {
        "single": tokens(rank, build(a)),
        "blend": tokens(rank, build("1", a, "2", b)),
        "default cache": tokens(rank, build(a, b, cache=None)),
        "different seeds": refusal(a, seed=rank),
        "missing on rank 1": refusal(a if rank == 0 else "absent"),
    }
    with open(f"{directory}/rank{rank}.json", "w") as stream:
        json.dump(result, stream)
    dist.destroy_process_group()

ranks = [multiprocessing.get_context("fork").Process(target=run, args=(rank,)) for rank in range(2)]
for process in ranks:
    process.start()
for process in ranks:
    process.join(60)
    process.kill()
sys.exit(any(process.exitcode for process in ranks))
"""


def test_two_processes_share_one_cache_and_one_order(tmp_path: Path, prefix: str) -> None:
    other = write_indexed_dataset(str(tmp_path / "other"), make_documents(30, 9), 257).prefix
    command = [sys.executable, "-c", PROGRAM, str(tmp_path), prefix, other]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=150)
    assert done.returncode == 0, done.stderr
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text(encoding="utf-8")) for rank in range(2)]
    for name, data_path in (
        ("single", (prefix,)),
        ("blend", ("1", prefix, "2", other)),
        ("default cache", (prefix, other)),
    ):
        alone = build(settings_for(*data_path), 60, 4, 4).train
        expected = [[alone[2 * g + i]["tokens"].tolist() for i in range(2)] for g in range(24)]
        assert [ranks[g % 2][name][g // 2] for g in range(24)] == expected, name
    for result in ranks:  # a problem of one rank is raised on both, so that neither waits for the other
        assert "the training data differs between ranks" in result["different seeds"]
        assert "absent.bin" in result["missing on rank 1"]
        assert "found by rank 1" in result["missing on rank 1"]


# ---------------------------------------------------------------- text files


def test_the_bytes_of_a_text_stay_on_disk(tmp_path: Path) -> None:
    """64 MiB, of which a copy would show."""
    path, line = tmp_path / "text", b"x" * 1022 + b" \n"
    path.write_bytes(line * (64 << 10))
    tracemalloc.start()
    text = read_text(str(path), ByteTokenizer(), 257)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 << 20
    assert isinstance(text.tokens, np.memmap) and text.tokens[-2000:].tobytes() == (line * 2)[-2000:]
    assert (text.num_bytes, text.num_words) == (64 << 20, 64 << 10)
    assert text.digest == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("piece", [1, 3, 1 << 20])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"caf\xc3\xa9 \xe9t\xe9", "invalid continuation byte at byte 6"),
        (b"caf\xe9", "unexpected end of data at byte 3"),
    ],
)
def test_a_text_that_is_not_utf8(
    content: bytes, message: str, piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scmoe_ds.data.text_file._PIECE_BYTES", piece)
    (tmp_path / "text").write_bytes(content)
    with pytest.raises(DataError, match=rf"^--text-file \S+ cannot be read as UTF-8 text: {message}$"):
        read_text(str(tmp_path / "text"), ByteTokenizer(), 257)


def test_a_text_and_a_tokenizer_of_another_model(tmp_path: Path) -> None:
    class Empty(Tokenizer):
        name = "GPT2BPETokenizer"

        def tokenize(self, text: str) -> list[int]:
            return []

        def detokenize(self, ids: Sequence[int]) -> str:
            return ""

    path = tmp_path / "text"
    path.write_text("letters")
    with pytest.raises(DataError, match=r"ByteTokenizer gives token 116, but the model has 116 tokens: name"):
        read_text(str(path), ByteTokenizer(), 116)
    with pytest.raises(DataError, match=r"GPT2BPETokenizer finds no token in --text-file .* its vocabulary is empty"):
        read_text(str(path), Empty(), 257)
    path.write_text("")
    assert [len(read_text(str(path), each, 257).tokens) for each in (Empty(), ByteTokenizer())] == [0, 0]

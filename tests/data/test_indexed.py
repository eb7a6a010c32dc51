"""Indexed datasets as other tools write them: documents of several sequences, end-of-document tokens not counted."""

import logging
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from scmoe_ds.analysis.tokens import read_data_set
from scmoe_ds.data.dataset import DataSettings, build_datasets, documents_of, validation_entropy
from scmoe_ds.data.indexed import check_token_range, read_layout
from scmoe_ds.data.indexed_writer import write_indexed_dataset
from scmoe_ds.data.sequences import Sequences, unigram_entropy
from scmoe_ds.data.tokenizer import ByteTokenizer
from scmoe_ds.errors import AnalysisError, DataError
from scmoe_ds.evaluation.documents import IndexedDocuments
from scmoe_ds.programs import run as program

EOD = 256


def write(prefix: Path, documents: list[tuple[list[int], list[int]]]) -> str:
    """Documents of (tokens, lengths of their sequences), with the calls of Megatron's tools."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for tokens, lengths in documents:
        builder.add_document(np.array(tokens), lengths)
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def settings_for(prefix: str, **changes: Any) -> DataSettings:
    return replace(DataSettings((prefix,), "8,2,0", 8, 5, ByteTokenizer()), **changes)


# ---------------------------------------------------------------- end-of-document tokens that are not counted


def not_counting(prefix: Path, eod: int = EOD) -> list[list[int]]:
    """Megatron-DeepSpeed's --append-eod: the token is in the .bin, and in no length. One document is empty, one has
    two sequences."""
    texts = [[i % 256] * (20 + i) for i in range(30)]
    written: list[tuple[list[int], list[int]]] = [([*text, eod], [len(text)]) for text in texts]
    written[3] = ([*texts[3], eod], [5, len(texts[3]) - 5])
    written.insert(9, ([], []))
    write(prefix, written)
    return [[*text, eod] for text in texts]


def test_an_uncounted_end_of_document_token_is_its_documents_last(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = not_counting(tmp_path / "data")
    prefix = str(tmp_path / "data")
    layout = read_layout(prefix, EOD)
    assert (layout.uncounted_eod, layout.num_tokens) == (EOD, sum(map(len, expected)))
    with caplog.at_level(logging.INFO, "scmoe_ds"):
        train = build_datasets(settings_for(prefix, split="1"), 500, 0, 0).train
    assert [f"{prefix}.idx does not count the token 256" in record.message for record in caplog.records] == [True]

    sequences = Sequences(prefix)
    assert [sequences[i].tolist() for i in (0, 3, 4, 30)] == [
        expected[0],
        expected[3][:5],
        expected[3][5:],
        expected[29],
    ]
    assert pickle.loads(pickle.dumps(sequences))[30].tolist() == expected[29]  # a data loader's process
    assert sequences.get(30, offset=2, length=3).tolist() == expected[29][2:5]
    order: Any = train
    stream = np.concatenate([sequences[i] for i in order.document_index])
    starts = [8 * i for i in order.shuffle_index]
    assert [order[i]["tokens"].tolist() for i in range(500)] == [stream[s : s + 8].tolist() for s in starts[:500]]

    documents = IndexedDocuments(prefix, None, ByteTokenizer())
    assert [documents.tokens(i).tolist() for i in range(30)] == expected
    assert read_data_set(prefix, None, 257).tolist() == [token for document in expected for token in document]


def test_a_dataset_that_counts_its_tokens_later_does_not_meet_the_old_indices(tmp_path: Path) -> None:
    not_counting(tmp_path / "data")
    first: Any = build_datasets(settings_for(str(tmp_path / "data")), 50, 0, 0).train
    tokens = (tmp_path / "data.bin").read_bytes()
    write_indexed_dataset(str(tmp_path / "data"), [[1, 2, 3]] * 100, 257)
    second: Any = build_datasets(settings_for(str(tmp_path / "data")), 50, 0, 0).train
    assert set(second[0]["tokens"].tolist()) == {1, 2, 3}
    assert first.unique_description_hash != second.unique_description_hash
    assert len(tokens) > 600


@pytest.mark.parametrize(
    ("eod", "last", "expected"),
    [
        (255, None, "end with token 255, and the tokenizer's end-of-document token is 256.*--tokenizer-type"),
        (EOD, 7, r"do not end with one token \(they end with 7, 256, …\), so it is not an uncounted"),
    ],
)
def test_one_token_too_many_that_is_something_else(tmp_path: Path, eod: int, last: int | None, expected: str) -> None:
    not_counting(tmp_path / "data", eod)
    if last is not None:
        content = (tmp_path / "data.bin").read_bytes()
        (tmp_path / "data.bin").write_bytes(content[:-2] + last.to_bytes(2, "little"))
    with pytest.raises(DataError, match=expected):
        read_layout(str(tmp_path / "data"), EOD)


@pytest.mark.parametrize(
    ("change", "reason"), [(-2, "truncated: copy it"), (+1, "of another run"), (+2, "of another run")]
)
def test_other_sizes_keep_their_reason(tmp_path: Path, change: int, reason: str) -> None:
    prefix = write_indexed_dataset(str(tmp_path / "data"), [[1, 2, 3], [4, 5]], 257).prefix
    content = (tmp_path / "data.bin").read_bytes() + b"\0\0"
    (tmp_path / "data.bin").write_bytes(content[: 10 + change])
    with pytest.raises(DataError, match=reason):
        check_token_range(read_layout(prefix), 257)


# ---------------------------------------------------------------- documents of several sequences


@pytest.mark.parametrize(("documents", "each"), [(10, 20), (1, 200), (40, 5)])
def test_validation_is_the_same_sequences_everywhere(tmp_path: Path, documents: int, each: int) -> None:
    """--split divides sequences. The last 40 of 200 hold other tokens than the rest."""
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, 16 if i < 160 else 256, 30).tolist() for i in range(200)]
    written = [
        ([token for text in texts[k * each : (k + 1) * each] for token in text], [30] * each) for k in range(documents)
    ]
    prefix = write(tmp_path / "data", written)
    tokens = [token for text in texts[160:] for token in text]
    counts = np.bincount(tokens)
    entropy = -sum(n / len(tokens) * np.log(n / len(tokens)) for n in counts[counts > 0])

    valid: Any = build_datasets(settings_for(prefix), 50, 10, 0).valid
    assert validation_entropy(valid) == pytest.approx(entropy, abs=1e-12)
    assert unigram_entropy(Sequences(prefix), range(160, 200)) == pytest.approx(entropy, abs=1e-12)
    assert read_data_set(prefix, "8,2,0", 257).tolist() == tokens
    with pytest.raises(AnalysisError, match=r"leaves no validation part .* leave --split out"):
        read_data_set(prefix, "1", 257)
    evaluated = IndexedDocuments(prefix, "8,2,0", ByteTokenizer())
    assert np.concatenate([evaluated.tokens(i) for i in range(len(evaluated.lengths))]).tolist() == tokens
    # A document is one text; only the first may have begun before the split.
    assert evaluated.lengths.tolist() == [30 * min(each, 40)] * max(40 // each, 1)
    assert len(IndexedDocuments(prefix, None, ByteTokenizer()).lengths) == documents


def test_messages_count_documents_not_sequences(tmp_path: Path) -> None:
    prefix = write(tmp_path / "data", [([k] * 90, [30, 30, 30]) for k in range(10)])
    train: Any = build_datasets(settings_for(prefix, split="1"), 50, 0, 0).train
    for sample in range(10):
        named = documents_of(train, [sample])[0]
        held = ", ".join(map(str, dict.fromkeys(train[sample]["tokens"].tolist() + train[sample]["labels"].tolist())))
        assert named == f"documents {held} of {prefix}"  # each document holds its own number
    (tmp_path / "data.bin").write_bytes((tmp_path / "data.bin").read_bytes()[:-2] + b"\xff\xff")
    with pytest.raises(DataError, match=r"token id 65535 \(document 9\)"):
        check_token_range(read_layout(prefix), 257)
    with pytest.raises(DataError, match=r"the valid split .* is 0 of 30 sequences .* --eval-iters 0"):
        build_datasets(settings_for(prefix, split="99,1"), 50, 10, 0)


@pytest.mark.parametrize("boundaries", [[0, 2, 1, 3], [1, 2, 2, 3]])
def test_boundaries_that_make_no_sense(tmp_path: Path, boundaries: list[int]) -> None:
    prefix = write_indexed_dataset(str(tmp_path / "data"), [[1], [2], [3]], 257).prefix
    content = (tmp_path / "data.idx").read_bytes()
    (tmp_path / "data.idx").write_bytes(content[:-32] + np.array(boundaries, np.int64).tobytes())
    with pytest.raises(DataError, match="contradicts itself"):
        check_token_range(read_layout(prefix), 257)


# ---------------------------------------------------------------- a file that changes while it is read


def test_a_bin_that_is_truncated_under_a_running_job_is_an_error_with_its_name(tmp_path: Path) -> None:
    """Through a memory map it would be a SIGBUS, which no test survives."""
    prefix = write_indexed_dataset(str(tmp_path / "data"), [[k] * 5000 for k in range(50)], 257).prefix
    train: Any = build_datasets(settings_for(prefix, split="1"), 50, 0, 0).train
    sequences = Sequences(prefix)
    with open(prefix + ".bin", "r+b") as stream:
        stream.truncate(1000)
    assert sequences.get(0, length=500).tolist() == [0] * 500
    with pytest.raises(DataError, match=r"data\.bin ends before byte 500000, .* truncated while it was in use"):
        sequences[49]
    with pytest.raises(DataError, match="truncated while it was in use"):
        [train[i] for i in range(50)]


def test_a_program_says_where_a_bus_error_came_from(monkeypatch: pytest.MonkeyPatch) -> None:
    enabled: list[int] = []
    monkeypatch.setattr(program.faulthandler, "is_enabled", lambda: False)
    monkeypatch.setattr(program.faulthandler, "enable", enabled.append)

    def refuse(argv: Any) -> Any:
        raise DataError("no")

    assert program.run_program("test", [], lambda: None, refuse) == 2
    assert enabled == [2]  # standard error

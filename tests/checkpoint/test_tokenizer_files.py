"""The tokenizer in checkpoints and exports: carried along, used by default, and no other one."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from scmoe_ds.checkpoint import loading, saving, tokenizer_files
from scmoe_ds.checkpoint.description import describe_model
from scmoe_ds.checkpoint.export import export, open_weights
from scmoe_ds.checkpoint.files import read_manifest
from scmoe_ds.checkpoint.safetensors_files import write_weights
from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.data.tokenizer import (
    ByteTokenizer,
    GPT2BPETokenizer,
    HuggingFaceTokenizer,
    Tokenizer,
    tokenizer_in,
)
from scmoe_ds.engine import connect
from scmoe_ds.errors import CheckpointError
from scmoe_ds.models.layers import GPTSettings
from scmoe_ds.programs import generate as generate_program
from tests.helpers.exports import whole_model

TEXT = "def return é 世界"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of GPT-2's kind: `one`, `other` with two ids exchanged, `merges` with another merge; as Hugging Face's too."""
    from tokenizers.implementations import ByteLevelBPETokenizer
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import PreTrainedTokenizerFast

    root = tmp_path_factory.mktemp("tokenizers")
    pieces = [*sorted(ByteLevel.alphabet()), "re", "de", "<|endoftext|>"]
    exchanged = [pieces[1], pieces[0], *pieces[2:]]
    for name, words, merges in (
        ("one", pieces, "r e\nd e"),
        ("other", exchanged, "r e\nd e"),
        ("merges", pieces, "d e"),
    ):
        place = root / name
        place.mkdir()
        (place / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
        (place / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
        bpe = ByteLevelBPETokenizer.from_file(str(place / "vocab.json"), str(place / "merges.txt"))
        hugging_face = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<|endoftext|>")
        hugging_face.save_pretrained(str(root / f"hf_{name}"))
    return root


def gpt2(directory: Path, name: str = "one") -> GPT2BPETokenizer:
    return GPT2BPETokenizer(str(directory / name / "vocab.json"), str(directory / name / "merges.txt"))


def test_identity(directory: Path) -> None:
    one, same = gpt2(directory), HuggingFaceTokenizer(str(directory / "hf_one"))
    identities = [
        tokenizer_files.describe(each)["identity"]
        for each in (one, same, gpt2(directory, "other"), gpt2(directory, "merges"), ByteTokenizer())
    ]
    assert identities[0] == identities[1], "the same ids for the same text, by another class"
    assert len({json.dumps(each) for each in identities}) == 4
    assert json.loads(json.dumps(identities)) == identities


@pytest.mark.parametrize("kind", ["bytes", "gpt2", "hugging face"])
def test_files_give_the_same_tokenizer(kind: str, directory: Path, tmp_path: Path) -> None:
    tokenizer: Tokenizer = {
        "bytes": ByteTokenizer,
        "gpt2": lambda: gpt2(directory),
        "hugging face": lambda: HuggingFaceTokenizer(str(directory / "hf_one")),
    }[kind]()
    found = tokenizer.files()
    for name, content in found.items():
        (tmp_path / name).write_bytes(content)
    again = tokenizer_in(tmp_path, tokenizer.name)
    assert again.tokenize(TEXT) == tokenizer.tokenize(TEXT) and again.eod == tokenizer.eod
    record = tokenizer_files.record(tokenizer_files.describe(tokenizer), found)
    assert tokenizer_files.recorded_tokenizer(tmp_path, json.loads(json.dumps(record)), "--load").name == tokenizer.name
    assert tokenizer_files.read_files(tmp_path, record) == found


def test_large_files_are_not_carried(directory: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tokenizer_files, "MOST_BYTES", 100)
    assert tokenizer_files.carried_files(gpt2(directory)) == {}
    record = tokenizer_files.record(tokenizer_files.describe(gpt2(directory)), {})
    with pytest.raises(
        CheckpointError, match=r"trained with GPT2BPETokenizer \(259 tokens.*name them with --tokenizer-type"
    ):
        tokenizer_files.recorded_tokenizer(tmp_path, record, "--load")


@pytest.fixture(scope="module")
def trained(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of a model that was trained with `one`."""
    connect()
    model = whole_model(GPTSettings(2, 16, 2, 384, 32), {"num_experts": 2})
    carried = tokenizer_files.carried_files(gpt2(directory))
    record = tokenizer_files.record(tokenizer_files.describe(gpt2(directory)), carried)
    first, second = tmp_path_factory.mktemp("first"), tmp_path_factory.mktemp("second")
    weights = [(name, (lambda value=parameter: value.detach())) for name, parameter in model.named_parameters()]
    write_weights(
        first,
        weights,
        {**describe_model(model.settings, model.config), "tokenizer": record},
        torch.float32,
        10**9,
        carried,
    )
    export(first, second)  # carries it on
    assert {"vocab.json", "merges.txt"} < read_manifest(second, "--load").keys()
    return second


def generate(trained: Path, *flags: str) -> int:
    return generate_program.main(
        ["--load", str(trained), "--prompt", "re", "--max-new-tokens", "3", "--temperature", "0", *flags]
    )


def test_generate_uses_the_recorded_one(trained: Path, directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(trained) == 0
    by_default = capsys.readouterr()
    assert "prefill 1 tokens" in by_default.err  # "re" is one token of it
    flags = ("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(directory / "hf_one"))
    assert generate(trained, *flags) == 0
    assert capsys.readouterr().out == by_default.out


def test_generate_refuses_another_one(trained: Path, directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    others = (
        ["ByteTokenizer"],
        ["HuggingFaceTokenizer", "--tokenizer-model", str(directory / "hf_other")],
        ["HuggingFaceTokenizer", "--tokenizer-model", str(directory / "hf_merges")],
    )
    for flags in others:
        assert generate(trained, "--tokenizer-type", *flags) == 2
        message = capsys.readouterr().err
        assert f"{flags[0]} (2" in message and "was trained with GPT2BPETokenizer (259 tokens" in message
        # What it says to use instead works.
        assert generate(trained, *shlex.split(message.split("use that one: ")[1])) == 0
        capsys.readouterr()
    assert generate(trained, "--vocab-file", "x") == 2
    assert "--vocab-file goes with a --tokenizer-type" in capsys.readouterr().err


def test_a_resume_with_another_tokenizer(trained: Path, directory: Path, caplog: Any) -> None:
    saved = open_weights(trained)[1]["tokenizer"]
    for name, same in (("one", True), ("other", False)):
        expected = tokenizer_files.record(tokenizer_files.describe(gpt2(directory, name)), {})
        if same:
            loading._check_tokenizer(trained, "--load", saved, expected, export=False)
            continue
        with pytest.raises(
            CheckpointError, match=r"this run's tokenizer is GPT2BPETokenizer \(259.*trained with GPT2BPE"
        ):
            loading._check_tokenizer(trained, "--load", saved, expected, export=False)
        with caplog.at_level("WARNING", logger="scmoe_ds"):  # new training with these weights: told, not refused
            loading._check_tokenizer(trained, "--load", saved, expected, export=True)
        assert "was trained with" in caplog.text
    loading._check_tokenizer(trained, "--load", None, expected, export=False)  # of an earlier version
    caplog.clear()
    larger = describe_model(GPTSettings(2, 16, 2, 512, 32), ScMoEConfig(num_experts=2))
    with pytest.raises(CheckpointError, match="vocab_size: 384 in the checkpoint, 512"):
        loading._check(trained, "--load", {**larger, "tokenizer": expected})
    assert "was trained with" in caplog.text, "the reason is named before what follows from it"


def test_a_checkpoint_carries_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Engine:
        overlap = type("", (), {"state": lambda self: None})()

    connect()
    monkeypatch.setattr(saving, "_write", lambda *args: [])
    monkeypatch.setattr(saving.finite, "check", lambda *args: None)
    monkeypatch.setattr(saving, "_splits", lambda engine: {})
    path = saving.save(Engine(), str(tmp_path), 1, 1, {}, carried={"vocab.json": b"{}"})
    assert (path / "vocab.json").read_bytes() == b"{}"
    assert read_manifest(path, "--load")["vocab.json"]["bytes"] == 2


def damages() -> Iterator[tuple[str, Any]]:
    yield "null", None
    yield "list", []
    yield "type", {"type": "Pickle"}
    yield "no identity", {"identity": {}}
    yield "eod", {"identity": {"vocab_size": 1, "eod": "1", "vocabulary_sha256": "", "probe_sha256": ""}}
    yield "files", {"files": "vocab.json"}
    for name in ("../vocab.json", "/etc/passwd", "", "..", ".", "a/b", 7, None, "a\0b"):
        yield repr(name), {"files": [name]}


@pytest.mark.parametrize("change", [change for _, change in damages()], ids=[name for name, _ in damages()])
def test_damaged_records(change: Any, trained: Path) -> None:
    record = open_weights(trained)[1]["tokenizer"]
    damaged = {**record, **change} if isinstance(change, dict) else change
    with pytest.raises(CheckpointError, match="record of the tokenizer"):
        tokenizer_files.recorded_tokenizer(trained, damaged, "--load")


def test_exchanged_files(trained: Path, directory: Path, tmp_path: Path) -> None:
    record = open_weights(trained)[1]["tokenizer"]
    for name in record["files"]:
        (tmp_path / name).write_bytes((directory / "other" / name).read_bytes())
    with pytest.raises(CheckpointError, match=r"its tokenizer files give GPT2BPETokenizer .* but it was trained with"):
        tokenizer_files.recorded_tokenizer(tmp_path, record, "--load")
    (tmp_path / "vocab.json").write_text("{")
    with pytest.raises(CheckpointError, match="its tokenizer does not load"):
        tokenizer_files.recorded_tokenizer(tmp_path, record, "--load")
    (tmp_path / "vocab.json").unlink()
    (tmp_path / "vocab.json").symlink_to(directory / "one" / "vocab.json")
    with pytest.raises(CheckpointError, match="a link that leads out"):
        tokenizer_files.recorded_tokenizer(tmp_path, record, "--load")

"""Tokenizers: round trips, what megatron-core reads of them, and every error."""

import json
from pathlib import Path

import pytest

from scmoe_ds.data import tokenizer as tokenizer_module
from scmoe_ds.data.tokenizer import (
    TOKENIZER_TYPES,
    ByteTokenizer,
    GPT2BPETokenizer,
    HuggingFaceTokenizer,
    build_tokenizer,
    pad_vocab_size,
)
from scmoe_ds.errors import DataError

TEXT = 'Grüße, 世界! 🙂\n\tdef f(x):  return "x"\r\n'


@pytest.fixture(scope="module")
def gpt2_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A vocab.json and merges.txt like GPT-2's: 256 byte tokens, a few merges, <|endoftext|> last."""
    from tokenizers.pre_tokenizers import ByteLevel

    directory = tmp_path_factory.mktemp("gpt2")
    pieces = [*sorted(ByteLevel.alphabet()), "re", "ret", "de", "<|endoftext|>"]
    vocab, merges = directory / "vocab.json", directory / "merges.txt"
    vocab.write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}), encoding="utf-8")
    merges.write_text("#version: 0.2\nr e\nre t\nd e\n", encoding="utf-8")
    return str(vocab), str(merges)


@pytest.fixture(scope="module")
def hugging_face_directory(tmp_path_factory: pytest.TempPathFactory, gpt2_files: tuple[str, str]) -> str:
    from tokenizers.implementations import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    directory = str(tmp_path_factory.mktemp("hf"))
    bpe = ByteLevelBPETokenizer.from_file(*gpt2_files)
    PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<|endoftext|>").save_pretrained(directory)
    return directory


def test_byte_tokenizer_ids_are_the_utf8_bytes() -> None:
    tokenizer = build_tokenizer("ByteTokenizer")
    assert (tokenizer.vocab_size, tokenizer.eod, tokenizer.pad) == (257, 256, -1)
    assert tokenizer.tokenize("aé") == [0x61, 0xC3, 0xA9]
    assert tokenizer.detokenize(tokenizer.tokenize(TEXT)) == TEXT
    assert tokenizer.detokenize([0x61, 256, 0x62]) == "ab"


def test_byte_tokenizer_shows_what_is_not_text() -> None:
    # 0xC3 without its second byte, and an id of the padded vocabulary
    assert ByteTokenizer().detokenize([0x61, 0xC3, 0x62]) == "a\ufffdb"
    assert ByteTokenizer().detokenize([0x61, 300, 0x62]) == "a\ufffdb"


def test_long_texts_are_encoded_in_parts_to_the_ids_of_the_whole(
    gpt2_files: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tokenizers import ByteLevelBPETokenizer

    odd = "a  b\n\n\n c\t\td 12  345's don't!  ?\x1c!\u2028\u00a0x\u3000\u3000世界  end  \r\n\r\n  "
    text = (TEXT + odd) * 20 + "x" * 300 + odd
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator([text], vocab_size=400, special_tokens=["<|endoftext|>"])
    trained.save_model(str(tmp_path))
    ours = GPT2BPETokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    for size in (1, 2, 3, 50):
        monkeypatch.setattr(tokenizer_module, "_PART_CHARACTERS", size)
        assert ours.tokenize(text) == trained.encode(text).ids


def test_gpt2_bpe(gpt2_files: tuple[str, str]) -> None:
    vocab_file, merge_file = gpt2_files
    tokenizer = build_tokenizer("GPT2BPETokenizer", vocab_file=vocab_file, merge_file=merge_file)
    assert (tokenizer.vocab_size, tokenizer.eod) == (260, 259)
    assert tokenizer.detokenize(tokenizer.tokenize(TEXT)) == TEXT
    vocab = json.loads(Path(vocab_file).read_text(encoding="utf-8"))
    # by hand: the merges r+e and re+t apply, then u, r, n are left
    assert tokenizer.tokenize("return") == [vocab[piece] for piece in ("ret", "u", "r", "n")]
    assert tokenizer.eod not in tokenizer.tokenize("<|endoftext|>")


def test_hugging_face(hugging_face_directory: str, gpt2_files: tuple[str, str]) -> None:
    tokenizer = build_tokenizer("HuggingFaceTokenizer", tokenizer_model=hugging_face_directory)
    assert (tokenizer.vocab_size, tokenizer.eod) == (260, 259)
    assert tokenizer.detokenize(tokenizer.tokenize(TEXT)) == TEXT
    assert tokenizer.tokenize("return") == GPT2BPETokenizer(*gpt2_files).tokenize("return")


def test_unique_identifiers_follow_the_vocabulary_not_the_path(gpt2_files: tuple[str, str], tmp_path: Path) -> None:
    original = GPT2BPETokenizer(*gpt2_files).unique_identifiers
    assert json.loads(json.dumps(original))["class"] == "GPT2BPETokenizer"
    vocab, merges = tmp_path / "v.json", tmp_path / "m.txt"
    vocab.write_bytes(Path(gpt2_files[0]).read_bytes())
    merges.write_bytes(Path(gpt2_files[1]).read_bytes())
    assert GPT2BPETokenizer(str(vocab), str(merges)).unique_identifiers == original
    merges.write_text("#version: 0.2\nr e\nd e\n", encoding="utf-8")
    assert GPT2BPETokenizer(str(vocab), str(merges)).unique_identifiers != original


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"tokenizer_type": "SentencePiece"}, "--tokenizer-type SentencePiece"),
        ({"tokenizer_type": "GPT2BPETokenizer", "merge_file": "m"}, "needs --vocab-file"),
        ({"tokenizer_type": "GPT2BPETokenizer", "vocab_file": "v"}, "needs --merge-file"),
        ({"tokenizer_type": "HuggingFaceTokenizer"}, "needs --tokenizer-model"),
        (
            {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": "no/such"},
            "--tokenizer-model no/such",
        ),
        (
            {"tokenizer_type": "GPT2BPETokenizer", "vocab_file": "no/v", "merge_file": "m"},
            "--vocab-file no/v is not a file",
        ),
    ],
)
def test_flag_errors(arguments: dict[str, str], expected: str) -> None:
    with pytest.raises(DataError, match=expected):
        build_tokenizer(arguments.pop("tokenizer_type"), **arguments)


def test_unknown_type_lists_the_known() -> None:
    with pytest.raises(DataError) as caught:
        build_tokenizer("nonsense")
    assert all(name in str(caught.value) for name in TOKENIZER_TYPES)


def test_broken_tokenizer_files(gpt2_files: tuple[str, str], tmp_path: Path) -> None:
    merge_file = gpt2_files[1]
    vocab = json.loads(Path(gpt2_files[0]).read_text(encoding="utf-8"))
    del vocab["<|endoftext|>"]
    without_eod, no_json = tmp_path / "without.json", tmp_path / "broken.json"
    without_eod.write_text(json.dumps(vocab), encoding="utf-8")
    no_json.write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match=r"no <\|endoftext\|>"):
        GPT2BPETokenizer(str(without_eod), merge_file)
    with pytest.raises(DataError, match="do not load"):
        GPT2BPETokenizer(str(no_json), merge_file)
    with pytest.raises(DataError, match="holds no tokenizer"):
        HuggingFaceTokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match="does not load"):
        HuggingFaceTokenizer(str(tmp_path))
    with pytest.raises(DataError, match="name these two with --vocab-file and --merge-file"):
        HuggingFaceTokenizer(str(Path(merge_file).parent))


def test_hugging_face_without_end_of_sequence(gpt2_files: tuple[str, str], tmp_path: Path) -> None:
    from tokenizers.implementations import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer.from_file(*gpt2_files)
    PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer).save_pretrained(str(tmp_path))
    with pytest.raises(DataError, match="no end-of-sequence token"):
        HuggingFaceTokenizer(str(tmp_path))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((257,), 384),
        ((384,), 384),
        ((50257,), 50304),
        ((50257, 128, 8), 51200),
        ((1, 1, 1), 1),
        ((5, 3, 2), 6),
    ],
)
def test_pad_vocab_size(arguments: tuple[int, ...], expected: int) -> None:
    assert pad_vocab_size(*arguments) == expected


@pytest.mark.parametrize("arguments", [(0,), (10, 0), (10, 128, 0)])
def test_pad_vocab_size_rejects(arguments: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match="at least 1"):
        pad_vocab_size(*arguments)

"""scmoe analyze similarity: its record and figure against plain computations, and what a user can get wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from scmoe_ds.analysis.similarity import measure
from scmoe_ds.analysis.subjects import swin_subject
from scmoe_ds.checkpoint.description import describe
from scmoe_ds.checkpoint.safetensors_files import write_weights
from scmoe_ds.data.images import Digits
from scmoe_ds.data.indexed_writer import write_indexed_dataset
from scmoe_ds.engine import connect
from scmoe_ds.programs import analyze as analyze_program
from tests.analysis.test_similarity import GPT2, gpt_by_hand, hugging_face_by_hand, plain_swin, swin_moe
from tests.helpers.exports import whole_model, write_export
from tests.helpers.hugging_face import TEXT_SHAPE


@pytest.fixture(scope="module", autouse=True)
def world_of_one() -> None:
    connect()


TEXT = "def similarity(a, b):\n    return a @ b / (norm(a) * norm(b))\n" * 8


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    directory = tmp_path_factory.mktemp("similarity")
    (directory / "text.txt").write_text(TEXT)
    (directory / "short.txt").write_text("short")
    (directory / "latin.txt").write_bytes(b"\xe9")
    (directory / "other.json").write_text('{"kind": "gating"}')
    (directory / "broken.json").write_text('{"kind": "similarity"}')
    (directory / "opt").mkdir()
    shape = {**TEXT_SHAPE, "vocab_size": 300}
    opt = transformers.OPTConfig(**shape, num_hidden_layers=1, ffn_dim=24, word_embed_proj_dim=16)
    transformers.OPTForCausalLM(opt).save_pretrained(directory / "opt")
    gpt2 = transformers.GPT2Config(vocab_size=300, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    transformers.GPT2LMHeadModel(gpt2).save_pretrained(directory / "gpt2")
    plain_swin().save_pretrained(directory / "swinv2")  # type: ignore[operator]
    small = transformers.GPT2Config(vocab_size=64, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    transformers.GPT2LMHeadModel(small).save_pretrained(directory / "small")
    model = whole_model(GPT2, {"num_experts": 4})
    export = write_export(directory / "export", model)
    with torch.no_grad():
        model.embedding.weight[ord("(")] = torch.inf
    write_export(directory / "infinite", model)
    text = np.frombuffer(TEXT.encode(), np.uint8)
    write_indexed_dataset(str(directory / "data"), [text], 257)
    write_indexed_dataset(str(directory / "parts"), [text[::-1], text[200:], text, text[::3]], 257)
    return {"DIR": str(directory), "EXPORT": str(export)}


def run(files: dict[str, str], *flags: str) -> int:
    return analyze_program.main(["similarity", *(flag.replace("DIR", files["DIR"]) for flag in flags)])


def test_program(files: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    directory = Path(files["DIR"])
    common = ("--load", "DIR/export", "--seq-length", "16", "--max-tokens", "100", "--batch-size", "4")
    assert run(files, *common, "--data-path", "DIR/data", "--output", "DIR/a.json") == 0
    out = capsys.readouterr().out
    assert "Pos-2 (block 0 attention → block 1 attention, …): mean cosine" in out and "wrote" in out
    record = json.loads((directory / "a.json").read_text())
    assert record["kind"] == "similarity" and record["tokens"] == 96
    assert record["identity"]["moe_blocks"] == [1, 3] and record["identity"]["num_layers"] == 4
    assert torch.__version__.startswith(record["versions"]["torch"].split("+")[0])
    tokens = torch.tensor(list(TEXT.encode()))[:96].view(6, 16)
    with torch.no_grad():
        kept = [value.flatten(0, 1).double() for value in gpt_by_hand(whole_model(GPT2, {"num_experts": 4}), tokens)]
    assert abs(record["l2"][1][4] - float((kept[1] - kept[4]).norm(dim=-1).mean())) <= 1e-6
    picture = directory / "a.png"
    before = picture.read_bytes()
    picture.unlink()
    assert run(files, "--from-json", "DIR/a.json") == 0
    assert picture.read_bytes() == before and before.startswith(b"\x89PNG")
    assert run(files, *common, "--text-file", "DIR/text.txt", "--output", "DIR/b.json") == 0
    assert json.loads((directory / "b.json").read_text())["cosine"] == record["cosine"]
    # Of four documents the third one is for validation.
    assert run(files, *common, "--data-path", "DIR/parts", "--split", "2,1,1", "--output", "DIR/c.json") == 0
    assert json.loads((directory / "c.json").read_text())["cosine"] == record["cosine"]


def test_program_with_hugging_face(files: dict[str, str]) -> None:
    assert (
        run(
            files,
            "--hf-model",
            "DIR/gpt2",
            "--text-file",
            "DIR/text.txt",
            "--tokenizer-type",
            "ByteTokenizer",
            "--output",
            "DIR/hf.json",
        )
        == 0
    )
    record = json.loads((Path(files["DIR"]) / "hf.json").read_text())
    assert record["seq_length"] == 16 and len(record["names"]) == 5 and record["tokens"] == len(TEXT) // 16 * 16
    model: Any = transformers.GPT2LMHeadModel.from_pretrained(Path(files["DIR"]) / "gpt2").eval()
    tokens = torch.tensor(list(TEXT.encode()))[: record["tokens"]].view(-1, 16)
    with torch.no_grad():
        values = [value.flatten(0, 1).double() for value in hugging_face_by_hand(model, "GPT-2", tokens)]
    expected = torch.nn.functional.cosine_similarity(values[1], values[3], dim=-1).mean()
    assert abs(record["verdict"]["positions"]["pos2"]["layers"][0]["cosine"] - float(expected)) <= 1e-6


def test_program_with_swin(files: dict[str, str]) -> None:
    """A SwinV2-MoE of this package and a plain one of transformers on handwritten digits."""
    directory = Path(files["DIR"])
    ours: Any = swin_moe()
    weights = [(name, lambda p=p: p.detach()) for name, p in sorted(ours.named_parameters())]
    whole = describe(ours.settings, ours.config, 1, {})
    write_weights(
        directory / "swin", weights, {key: whole[key] for key in ("model", "swin", "scmoe")}, torch.float32, 10**9
    )
    theirs: Any = plain_swin()
    digits = Digits(16).images[:6]
    for model, flags in ((ours, ("--load", "DIR/swin")), (theirs.eval(), ("--hf-model", "DIR/swinv2"))):
        expected = measure(swin_subject(model), digits.split(4)).record()
        assert (
            run(
                files,
                *flags,
                "--images",
                "digits",
                "--max-images",
                "6",
                "--batch-size",
                "4",
                "--output",
                "DIR/swin.json",
            )
            == 0
        )
        record = json.loads((directory / "swin.json").read_text())
        assert record["names"] == expected["names"] and record["tokens"] == 6 * 256
        assert record["cosine"][-1][:-1] == pytest.approx(expected["cosine"][-1][:-1], abs=1e-6)
        assert len(record["verdict"]["positions"]["pos2"]["layers"]) == 3


OUT = ("--output", "DIR/never.json")
ON_TEXT = (*OUT, "--text-file", "DIR/text.txt")
ON_DATA = (*OUT, "--data-path", "DIR/data")
BAD: dict[str, tuple[tuple[str, ...], str]] = {
    "no model": (ON_TEXT, "--load or --hf-model is missing"),
    "two models": ((*ON_TEXT, "--load", "a", "--hf-model", "b"), "--load or --hf-model: give one of them, not several"),
    "no data": ((*OUT, "--load", "DIR/export"), "--data-path or --text-file or --images is missing"),
    "no output": (("--load", "DIR/export", "--text-file", "DIR/text.txt"), "--output is missing"),
    "output": (("--load", "DIR/export", "--text-file", "x", "--output", "DIR/x.txt"), "must end in .json"),
    "output nowhere": (("--load", "DIR/export", "--text-file", "x", "--output", "DIR/no/x.json"), "cannot be written"),
    "no checkpoint": ((*ON_TEXT, "--load", "DIR/nowhere"), "is neither a checkpoint nor"),
    "short text": (
        (*OUT, "--load", "DIR/export", "--text-file", "DIR/short.txt"),
        "has 5 tokens, less than one sequence of 48",
    ),
    "short data": (
        (*ON_DATA, "--load", "DIR/export", "--max-tokens", "47"),
        "--max-tokens 47: less than one sequence of 48",
    ),
    "no text": ((*OUT, "--load", "DIR/export", "--text-file", "DIR/nowhere"), "cannot be read as UTF-8 text"),
    "no UTF-8": ((*OUT, "--load", "DIR/export", "--text-file", "DIR/latin.txt"), "cannot be read as UTF-8 text"),
    "no validation": (
        (*OUT, "--data-path", "DIR/parts", "--split", "1,0,0", "--load", "DIR/export"),
        "--split 1,0,0 leaves no validation part of --data-path DIR/parts",
    ),
    "split of a text": ((*ON_TEXT, "--split", "1,1,0", "--load", "DIR/export"), "--split is of a data set"),
    "no data set": ((*OUT, "--load", "DIR/export", "--data-path", "DIR/no"), "no.bin and"),
    "long": ((*ON_TEXT, "--load", "DIR/export", "--seq-length", "49"), "exceeds the model's context of 48"),
    "batch size": ((*ON_TEXT, "--load", "DIR/export", "--batch-size", "0"), "--batch-size 0: must be at least 1"),
    "moe every": ((*ON_TEXT, "--load", "DIR/export", "--moe-every", "5"), "--moe-every 5: the model has 4 blocks"),
    "not finite": ((*ON_TEXT, "--load", "DIR/infinite"), "input is not finite in batch 0"),
    "hf nowhere": ((*ON_TEXT, "--hf-model", "gpt2"), "--hf-model gpt2 is not a local directory"),
    "hf no model": ((*ON_TEXT, "--hf-model", "DIR"), "does not load as a causal language model"),
    "hf family": (
        (*ON_TEXT, "--hf-model", "DIR/opt", "--tokenizer-type", "ByteTokenizer"),
        "OPTForCausalLM has no nn.ModuleList",
    ),
    "hf no tokenizer": ((*ON_TEXT, "--hf-model", "DIR/gpt2"), "DIR/gpt2 holds no tokenizer"),
    "hf vocabulary": (
        (*ON_TEXT, "--hf-model", "DIR/small", "--tokenizer-type", "ByteTokenizer"),
        "but the model has 64 tokens",
    ),
    "hf data": ((*ON_DATA, "--hf-model", "DIR/small"), "the vocabulary has 64 tokens"),
    "no swin": ((*OUT, "--images", "digits", "--load", "DIR/export"), "--images goes with a SwinV2"),
    "no swin of hf": ((*OUT, "--images", "digits", "--hf-model", "DIR/gpt2"), '--hf-model DIR/gpt2 is a "gpt2"'),
    "no images": ((*OUT, "--images", "DIR/no", "--hf-model", "DIR/swinv2"), "no such directory"),
    "json nowhere": (("--from-json", "DIR/nowhere.json"), "cannot be read as JSON"),
    "json of another": (
        ("--from-json", "DIR/other.json"),
        'is no record of "similarity"; use the sub-command "gating"',
    ),
    "json incomplete": (("--from-json", "DIR/broken.json"), "is incomplete"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, files: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    flags, message = BAD[case]
    assert run(files, *flags) == 2
    errors = capsys.readouterr().err
    lines = [line for line in errors.splitlines() if line.startswith("scmoe analyze: error: ")]
    assert len(lines) == 1 and message.replace("DIR", files["DIR"]) in lines[0] and "Traceback" not in errors, errors
    assert not (Path(files["DIR"]) / "never.json").exists()

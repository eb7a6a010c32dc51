"""Exports whose JSON is damaged or made up: one sentence and exit code 2, before anything is built or read elsewhere."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from scmoe_ds.analysis.swin import open_swin
from scmoe_ds.checkpoint import files
from scmoe_ds.checkpoint.description import describe
from scmoe_ds.checkpoint.export import export, open_weights
from scmoe_ds.checkpoint.safetensors_files import CONFIG_FILE, INDEX_FILE, write_weights
from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.engine import connect
from scmoe_ds.errors import CheckpointError
from scmoe_ds.inference.model import TrainedModel
from scmoe_ds.models.layers import GPTSettings
from scmoe_ds.models.swin import SwinMoE
from scmoe_ds.models.swin_settings import SwinSettings
from scmoe_ds.programs import adapt as adapt_program
from scmoe_ds.programs import analyze as analyze_program
from scmoe_ds.programs import convert as convert_checkpoint
from scmoe_ds.programs import evaluate as evaluate_program
from scmoe_ds.programs import generate as generate_program
from tests.helpers.exports import sign, whole_model, write_export

Change = Callable[[dict[str, Any]], Any]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    connect()
    model = whole_model(GPTSettings(2, 16, 2, 384, 16), {"num_experts": 4})
    return write_export(tmp_path_factory.mktemp("good") / "export", model)


def changed(good: Path, out: Path, name: str, change: Change | str) -> Path:
    shutil.copytree(good, out)
    if isinstance(change, str):
        (out / name).write_text(change)
    else:
        whole = json.loads((out / name).read_text())
        change(whole)
        (out / name).write_text(json.dumps(whole))
    return sign(out)


def errors(capsys: pytest.CaptureFixture[str]) -> str:
    """What a program wrote to stderr, but for the line that says which checkpoint it loads."""
    return "".join(line for line in capsys.readouterr().err.splitlines(True) if not line.startswith("loading "))


def put(*keys_and_value: Any) -> Change:
    *parents, key, value = keys_and_value

    def change(whole: dict[str, Any]) -> None:
        for parent in parents:
            whole = whole[parent]
        whole[key] = value

    return change


def drop(key: str) -> Change:
    return lambda whole: whole.pop(key)


CONFIGS: dict[str, Change | str] = {
    "no scmoe": drop("scmoe"),
    "no gpt": drop("gpt"),
    "gpt and swin": put("swin", {}),
    "unknown key": put("gpt", "evil", 1),
    "missing key": lambda whole: whole["gpt"].pop("hidden_size"),
    "text for a number": put("gpt", "hidden_size", "16"),
    "true for a number": put("gpt", "num_layers", True),
    "a fraction": put("gpt", "num_layers", 2.5),
    "null": put("gpt", "vocab_size", None),
    "gpt null": put("gpt", None),
    "gpt a list": put("gpt", [1, 2]),
    "negative": put("gpt", "num_layers", -2),
    "no layers": put("gpt", "num_layers", 0),
    "no heads": put("gpt", "num_attention_heads", 0),
    "heads that do not divide": put("gpt", "num_attention_heads", 3),
    "infinite": put("gpt", "residual_scale", 1e999),
    "another norm": put("gpt", "normalization", "x"),
    "another position": put("gpt", "position_embedding", "__import__('os')"),
    "huge number": put("gpt", "ffn_hidden_size", 10**30),
    "wide": put("gpt", "ffn_hidden_size", 2**31),
    "wider": put("gpt", "hidden_size", 2**30),
    "long": put("gpt", "max_position_embeddings", 2**31),
    "many layers": put("gpt", "num_layers", 2**24),
    "many experts": put("scmoe", "num_experts", 10**6),
    "a pyramid": put("scmoe", "num_experts", [10**6]),
    "one expert more": put("scmoe", "num_experts", 5),
    "sparse": put("scmoe", "moe_every", 10**9),
    "section key": put("scmoe", "evil", 1),
    "section null": put("scmoe", None),
    "section list": put("scmoe", []),
    "section type": put("scmoe", "top_k", {}),
    "torch_dtype": put("torch_dtype", "x"),
    "torch_dtype null": put("torch_dtype", None),
    "torch_dtype list": put("torch_dtype", ["float32"]),
    "tokenizer": put("tokenizer", 5),
    "not JSON": "{",
    "a list": "[]",
    "nesting": "[" * 100_000,
    "nested objects": '{"gpt":' * 100_000,
    "digits": '{"gpt": ' + "9" * 5000 + "}",
    "empty": "",
}
INDICES: dict[str, Change | str] = {
    "no weight_map": drop("weight_map"),
    "weight_map null": put("weight_map", None),
    "weight_map list": put("weight_map", ["a"]),
    "weight_map empty": put("weight_map", {}),
    "a number": put("weight_map", "embedding.weight", 1),
    "a list": put("weight_map", "embedding.weight", ["x"]),
    "an unknown file": put("weight_map", "embedding.weight", "absent.safetensors"),
    "a parameter less": lambda whole: whole["weight_map"].pop("embedding.weight"),
    "above": put("weight_map", "embedding.weight", "../outside/model-00001-of-00001.safetensors"),
    "absolute": put("weight_map", "embedding.weight", "/etc/passwd"),
    "the directory": put("weight_map", "embedding.weight", "."),
    "nothing": put("weight_map", "embedding.weight", ""),
    "no weights": put("weight_map", "embedding.weight", CONFIG_FILE),
    "nesting": "[" * 100_000,
}


@pytest.mark.parametrize(
    ("name", "case"), [*((CONFIG_FILE, case) for case in CONFIGS), *((INDEX_FILE, case) for case in INDICES)]
)
def test_json(name: str, case: str, good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = changed(good, tmp_path / "export", name, (CONFIGS if name == CONFIG_FILE else INDICES)[case])
    started = time.monotonic()
    assert generate_program.main(["--load", str(path), "--prompt", "ab", "--max-new-tokens", "2"]) == 2
    message = errors(capsys)
    assert message.startswith("scmoe generate: error: ") and message.count("\n") == 1, message
    assert str(path) in message or "the checkpoint's " in message
    assert time.monotonic() - started < 10, "a model of that size was built"


@pytest.mark.parametrize("case", ["many layers", "many experts", "wide"])
def test_every_program(case: str, good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(changed(good, tmp_path / "export", CONFIG_FILE, CONFIGS[case]))
    text = tmp_path / "text.txt"
    text.write_text("abc " * 20)
    runs: list[Callable[[], Any]] = [
        lambda: evaluate_program.main(["--load", path, "--text-file", str(text)]),
        lambda: analyze_program.main(
            ["similarity", "--load", path, "--text-file", str(text), "--output", str(tmp_path / "out.json")]
        ),
        lambda: generate_program.main(["--load", path, "--prompt", "a", "--experts", "offload"]),
    ]
    if case != "wide":  # a conversion builds no model
        runs.append(lambda: convert_checkpoint.main(["export", path, str(tmp_path / "out")]))
        runs.append(lambda: adapt_program.main([path, "--output", str(tmp_path / "other")]))
    for run in runs:
        assert run() == 2
        message = errors(capsys)
        assert message.count("\n") == 1 and "Traceback" not in message, message


def test_links(good: Path, tmp_path: Path) -> None:
    """One that leaves the directory is refused; Hugging Face's cache, which consists of links into its store, is not."""
    out, (shard,) = tmp_path / "export", [file.name for file in good.glob("*.safetensors")]
    shutil.copytree(good, out)
    (tmp_path / "elsewhere").mkdir()
    shutil.move(out / shard, tmp_path / "elsewhere" / shard)
    (out / shard).symlink_to(tmp_path / "elsewhere" / shard)
    with pytest.raises(CheckpointError, match=f"{shard}, which {INDEX_FILE} names, is a link that leads out"):
        open_weights(out)
    blobs, snapshot = tmp_path / "models--x" / "blobs", tmp_path / "models--x" / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    shutil.copytree(good, blobs)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(os.path.relpath(file, snapshot))
    weights, _ = open_weights(snapshot)
    assert torch.equal(weights.read("embedding.weight"), load_file(good / shard)["embedding.weight"])


def test_a_shard_that_nobody_vouches_for(good: Path, tmp_path: Path) -> None:
    out = tmp_path / "export"
    shutil.copytree(good, out)
    manifest = json.loads((out / files.MANIFEST_FILE).read_text())
    (shard,) = [name for name in manifest if name.endswith(".safetensors")]
    del manifest[shard]
    (out / files.MANIFEST_FILE).write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=f"{shard} is not named in"):
        open_weights(out)


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"\xff" * 8,
        (2**40).to_bytes(8, "little") + b"{}",
        b"\x02" + b"\0" * 7 + b"[]",
        (10**5).to_bytes(8, "little") + b"[" * 10**5,
    ],
)
def test_tensor_files(header: bytes, good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "export"
    shutil.copytree(good, out)
    next(out.glob("*.safetensors")).write_bytes(header)
    sign(out)
    for flags in ([], ["--experts", "offload"]):
        assert generate_program.main(["--load", str(out), "--prompt", "ab", *flags]) == 2
        assert errors(capsys).count("\n") == 1


def test_experts_of_another_type_or_shape(good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "export"
    shutil.copytree(good, out)
    shard = next(out.glob("*.safetensors"))
    whole = load_file(shard)
    expert = next(name for name in whole if ".deepspeed_experts." in name and whole[name].dim() == 2)
    for value, words in ((whole[expert].double(), "is of type F64"), (whole[expert].t().contiguous(), "has shape")):
        save_file({**whole, expert: value}, shard)
        sign(out)
        assert generate_program.main(["--load", str(out), "--prompt", "ab", "--experts", "offload"]) == 2
        assert words in capsys.readouterr().err


def test_swin(tmp_path: Path) -> None:
    connect()
    settings = SwinSettings(16, 4, 8, (1, 1, 2, 2), (1, 1, 2, 2), num_classes=3, patch_size=1)
    config = ScMoEConfig.from_deepspeed({"scmoe": {"num_experts": 2}})
    model = SwinMoE(settings, config)
    weights = [(name, (lambda value=parameter: value.detach())) for name, parameter in model.named_parameters()]
    described = {key: value for key, value in describe(settings, config, 1, {}).items() if key != "layout"}
    good = tmp_path / "good"
    write_weights(good, weights, described, torch.float32, 10**9)
    assert open_swin(str(good), torch.device("cpu")).settings == settings
    for number, change in enumerate(
        (
            put("swin", "depths", [1, 1, 2**24, 2]),
            put("swin", "embed_dim", 2**30),
            put("swin", "patch_size", 0),
            put("swin", "window_size", 0),
            put("swin", "depths", "1111"),
            put("swin", "depths", [1, 1, 2, "2"]),
            put("swin", "evil", 1),
            put("scmoe", "num_experts", 10**6),
        )
    ):
        with pytest.raises(CheckpointError):
            open_swin(str(changed(good, tmp_path / str(number), CONFIG_FILE, change)), torch.device("cpu"))


def test_an_honest_export_is_read(good: Path, tmp_path: Path) -> None:
    assert TrainedModel.open(good).settings == GPTSettings(2, 16, 2, 384, 16)
    # Fields that an earlier version did not write have their defaults.
    path = changed(good, tmp_path / "export", CONFIG_FILE, lambda whole: whole["gpt"].pop("residual_scale"))
    assert TrainedModel.open(path).settings.residual_scale == 1.0
    assert export(good, tmp_path / "again") == 1


@pytest.mark.parametrize(
    "text",
    [
        "[",
        "[]",
        "[" * 100_000,
        "{}",
        '{"model_type": "swinv2"}',
        '{"model_type": "swinv2", "depths": 3}',
        '{"model_type": "gpt2", "n_layer": "x"}',
        '{"model_type": "x", "auto_map": {"AutoModelForCausalLM": "evil.X"}}',
    ],
)
def test_hugging_face_models(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(text)
    (tmp_path / "evil.py").write_text("raise SystemExit('it ran')")
    (tmp_path / "text.txt").write_text("abc")
    for what in (["--images", "digits"], ["--text-file", str(tmp_path / "text.txt")]):
        flags = ["--hf-model", str(tmp_path), *what, "--output", str(tmp_path / "out.json")]
        assert analyze_program.main(["similarity", *flags]) == 2
        assert f"--hf-model {tmp_path}" in capsys.readouterr().err

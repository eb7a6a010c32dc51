"""Weights out of checkpoints: safetensors, and a Residual MoE that becomes a ScMoE."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import scmoe_ds
from scmoe_ds import checkpoint
from scmoe_ds.checkpoint.export import export
from scmoe_ds.checkpoint.extents import extents_of
from scmoe_ds.checkpoint.safetensors_files import CONFIG_FILE, INDEX_FILE, write_weights
from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.engine import connect
from scmoe_ds.errors import CheckpointError
from scmoe_ds.models.gpt import GPT
from scmoe_ds.models.initialization import initialize_parameters
from scmoe_ds.models.layers import GPTSettings
from scmoe_ds.programs.convert import main
from tests.helpers.exports import whole_model, write_export

SETTINGS = GPTSettings(
    4, 16, 2, 32, 16, normalization="RMSNorm", swiglu=True, ffn_hidden_size=24, layernorm_epsilon=1e-3
)
TOKENS = torch.randint(32, (2, 16), generator=torch.Generator().manual_seed(3))
# Every token reaches its experts: outputs then depend on the weights alone.
SECTION = {"architecture": "shared_expert", "num_experts": 4, "drop_tokens": False, "use_rts": False}


def make_json(**changes: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "zero_optimization": {"stage": 1},
        "scmoe": {**SECTION, **changes},
    }


@pytest.fixture(scope="module", autouse=True)
def world_of_one() -> None:
    connect()


def make_engine(whole: dict[str, Any], seed: int) -> Any:
    model = GPT(SETTINGS, ScMoEConfig.from_deepspeed(whole))
    initialize_parameters(model, seed, 0.3, SETTINGS.num_layers)
    return scmoe_ds.initialize(model=model, config=whole)[0]


def describe(whole: dict[str, Any]) -> dict[str, Any]:
    return checkpoint.describe(SETTINGS, ScMoEConfig.from_deepspeed(whole), 1, whole)


@pytest.fixture(scope="module")
def residual(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Tensor], Tensor]:
    """A checkpoint of a Residual MoE that has made two steps, its weights, and its logits."""
    whole, save = make_json(), str(tmp_path_factory.mktemp("residual"))
    engine = make_engine(whole, 1)
    for _ in range(2):
        engine.backward(engine(TOKENS, labels=TOKENS).loss)
        engine.step()
    checkpoint.save(engine, save, 2, 4, describe(whole))
    return save, {n: p.detach().clone() for n, p in engine.module.named_parameters()}, logits(engine.module)


def logits(model: torch.nn.Module) -> Tensor:
    model.eval()
    with torch.no_grad():
        return model(TOKENS).logits


def start_with(export: Path, whole: dict[str, Any]) -> Any:
    """The engine of a run with --load <export>."""
    source = checkpoint.choose(str(export), None, False, describe(whole))
    assert source is not None and source.weights_only
    engine = make_engine(whole, 2)
    assert checkpoint.load(engine, source) == (0, 0)
    return engine


def test_export_and_start(residual: tuple[str, dict[str, Tensor], Tensor], tmp_path: Path) -> None:
    save, weights, expected = residual
    assert main(["export", save, str(tmp_path / "out"), "--shard-gb", "5e-6"]) == 0
    index = json.loads((tmp_path / "out" / INDEX_FILE).read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 2 and shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    assert index["weight_map"].keys() == weights.keys()
    assert index["metadata"]["total_size"] == sum(4 * weight.numel() for weight in weights.values())
    for shard in shards:
        tensors = load_file(tmp_path / "out" / shard)
        assert sum(each.nbytes for each in tensors.values()) <= 5000 or len(tensors) == 1
        for name, tensor in tensors.items():
            assert torch.equal(tensor, weights[name]), name
    kinds = {file.suffix for file in (tmp_path / "out").iterdir()}
    assert kinds == {".safetensors", ".json"}, "no pickle"
    # The directory alone is enough to build the model again …
    model = GPT(*checkpoint.rebuild(json.loads((tmp_path / "out" / CONFIG_FILE).read_text())))
    model.load_state_dict({n: t for shard in shards for n, t in load_file(tmp_path / "out" / shard).items()})
    assert torch.equal(logits(model), expected)
    # … and a run that starts with it steps these weights, not those that it was initialised with.
    engine = start_with(tmp_path / "out", make_json())
    assert torch.equal(logits(engine.module), expected)
    engine.train()
    engine.backward(engine(TOKENS, labels=TOKENS).loss)
    engine.step()
    for name, parameter in engine.module.named_parameters():
        assert (parameter - weights[name]).abs().max() < 0.011, name  # Adam's first step is the learning rate
    assert engine.global_steps == 1


def test_bf16_export(residual: tuple[str, dict[str, Tensor], Tensor], tmp_path: Path) -> None:
    save, weights, _ = residual
    assert main(["export", save + "/global_step2", str(tmp_path / "out"), "--dtype", "bf16"]) == 0
    tensors = load_file(tmp_path / "out" / "model-00001-of-00001.safetensors")
    assert all(torch.equal(tensors[name], weight.bfloat16()) for name, weight in weights.items())
    assert json.loads((tmp_path / "out" / CONFIG_FILE).read_text())["torch_dtype"] == "bfloat16"
    engine = start_with(tmp_path / "out", make_json())
    for name, parameter in engine.module.named_parameters():
        assert torch.equal(parameter, weights[name].bfloat16().float())


def test_a_description_from_before_norm_placement_is_of_a_pre_norm_model() -> None:
    then = describe(make_json())
    for key in ("norm_placement", "residual_scale"):
        del then["model"][key]
    checkpoint.description.check_model(then, describe(make_json()), "it")
    now = checkpoint.describe(replace(SETTINGS, norm_placement="post"), ScMoEConfig.from_deepspeed(make_json()), 1, {})
    with pytest.raises(CheckpointError, match="norm_placement: 'pre' in the checkpoint, 'post' in this run"):
        checkpoint.description.check_model(then, now, "it")


def test_bad_input(
    residual: tuple[str, dict[str, Tensor], Tensor], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    save = residual[0]
    out, used, nothing = (str(tmp_path / name) for name in ("out", "used", "nothing"))
    Path(used).mkdir()
    (Path(used) / "file").touch()
    Path(nothing).mkdir()
    cases = [
        (["export", nothing, out], r"neither a checkpoint nor a directory of them nor an export"),
        (["export", save, used], r"is not empty; name another directory"),
        (["export", save, out, "--shard-gb", "inf"], r"--shard-gb inf: must be a finite number above 0"),
        (["export", save, out, "--model", used], f"--model {used}: is for a checkpoint of a Hugging Face model"),
        (["export", save, used + "/file/out"], r"the export was not written"),
    ]
    for argv, message in cases:
        capsys.readouterr()
        assert main(argv) == 2, argv
        error = capsys.readouterr().err
        assert message in error and error.startswith("scmoe convert: error: ") and error.count("\n") == 1
        assert not Path(out).exists()


def test_a_damaged_or_foreign_export_is_refused(
    residual: tuple[str, dict[str, Tensor], Tensor], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert main(["export", residual[0], str(out)]) == 0
    other = describe(make_json(num_experts=8))
    with pytest.raises(CheckpointError, match=r"another model: scmoe\.num_experts: 4 in the checkpoint, 8 in this run"):
        checkpoint.choose(str(out), None, False, other)
    shard = out / "model-00001-of-00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"safetensors is damaged: its checksum"):
        checkpoint.choose(str(out), None, False, describe(make_json()))
    assert main(["export", str(out), str(tmp_path / "again")]) == 2


@pytest.mark.parametrize("ends", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_what_could_not_be_written_whole_is_removed(ends: BaseException, tmp_path: Path) -> None:
    def fail() -> Tensor:
        raise ends

    weights = [("a", lambda: torch.ones(4)), ("b", lambda: torch.ones(4)), ("c", fail)]
    with pytest.raises((CheckpointError, KeyboardInterrupt)):
        write_weights(tmp_path, weights, {}, torch.float32, 16)
    assert not list(tmp_path.iterdir())
    assert write_weights(tmp_path, weights[:2], {}, torch.float32, 16) == 2


def test_a_moe_of_two_pairs_is_saved_once_and_comes_back(tmp_path: Path) -> None:
    """DGMoE-Share: checkpoint, resume, export and start from the export."""
    whole = make_json(architecture="dgmoe", pairs_per_moe=2, use_rts=False)
    engine = make_engine(whole, 1)
    engine.backward(engine(TOKENS, labels=TOKENS).loss)
    engine.step()
    expected = logits(engine.module)
    saved = checkpoint.save(engine, str(tmp_path / "saved"), 1, 2, describe(whole))
    assert len(list(saved.glob("layer_*_expert_*"))) == 4, "one set of experts"
    assert export(saved, tmp_path / "export") == 1
    for source in (str(tmp_path / "saved"), str(tmp_path / "export")):
        other = make_engine(whole, 2)
        assert not torch.equal(logits(other.module), expected)
        checkpoint.load(other, checkpoint.choose(source, None, False, describe(whole)))
        assert torch.equal(logits(other.module), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_begin_at_pages(dtype: torch.dtype, tmp_path: Path) -> None:
    """Those of whole pages, and safetensors' own loader reads the files; an expert's weights lie side by side."""
    model = whole_model(replace(SETTINGS, hidden_size=64, ffn_hidden_size=128), SECTION)
    out = write_export(tmp_path / "out", model, dtype, shard_bytes=400_000)
    expected = model.state_dict()
    loaded = {name: tensor for file in out.glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert loaded.keys() == expected.keys() and len(list(out.glob("*.safetensors"))) > 1
    assert all(torch.equal(loaded[name], expected[name].to(dtype)) for name in expected)
    found = extents_of(out, list(expected))
    whole = {name: place for name, place in found.items() if place.nbytes % 4096 == 0}
    assert all(place.offset % 4096 == 0 for place in whole.values())
    firsts = [name for name in whole if name.endswith("input.weight") and ".deepspeed_experts." in name]
    assert len(firsts) == 2 * SECTION["num_experts"]
    for name in firsts:
        first, second = whole[name], whole[name.replace("input.weight", "output.weight")]
        assert (second.file, second.offset) == (first.file, first.offset + first.nbytes)

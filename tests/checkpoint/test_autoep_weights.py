"""Weights of Hugging Face MoE models go into AutoEP's layout and come out again, bit by bit, on any number of ranks."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import deepspeed
import pytest
import torch
import torch.distributed as dist
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.integrations import HfDeepSpeedConfig, is_deepspeed_zero3_enabled

import scmoe_ds
from lab.distributed import run_distributed
from lab.moe_families import EXPERTS, FAMILIES, batch, tiny
from scmoe_ds.checkpoint.autoep import shards
from scmoe_ds.checkpoint.autoep.export import export_hugging_face
from scmoe_ds.checkpoint.autoep.loading import _load
from scmoe_ds.checkpoint.autoep.trained import Trained
from scmoe_ds.compat import forget_process_groups
from scmoe_ds.engine.attach import prepare_autoep
from scmoe_ds.errors import CheckpointError, ScMoEConfigError
from scmoe_ds.programs.convert import main
from scmoe_ds.replace.own_experts import OwnExperts

SHARD = 40_000


TIED = "olmoe, tied embeddings"


def model_of(family: str) -> Any:
    more: dict[str, Any] = {"layer_types": ["full_attention"]} if family == "qwen3_5_moe" else {}
    if family == TIED:
        family, more = "olmoe", {"tie_word_embeddings": True}
    return tiny(family, num_hidden_layers=1, **more)


def saved(family: str, directory: Path, **kwargs: Any) -> Path:
    """A directory as transformers writes it, in several files, with a tokenizer's."""
    model_of(family).save_pretrained(directory, max_shard_size=SHARD, **kwargs)
    (directory / "tokenizer.json").write_text("{}")
    return directory


def whole(ep_size: int, stage: int = 1, **more: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "Adam", "params": {"lr": 1e-2, "torch_adam": True}},
        "zero_optimization": {"stage": stage},
        "expert_parallel": {"enabled": True, "autoep_size": ep_size},
        "scmoe": {"overlap": {"calibration_steps": 0}},
        **more,
    }


def tensors(directory: Path) -> dict[str, Tensor]:
    return {name: value for file in directory.glob("*.safetensors") for name, value in load_file(file).items()}


def assert_same(directory: Path, original: Path) -> None:
    found, expected = tensors(directory), tensors(original)
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name].dtype != expected[name].dtype] == []
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


@pytest.fixture
def one_process() -> Iterator[None]:
    scmoe_ds.connect()
    yield
    forget_process_groups()


@pytest.mark.parametrize("family", [*FAMILIES, TIED])
def test_every_family_goes_in_and_out(family: str, tmp_path: Path, one_process: None) -> None:
    """In: the values, dtypes and buffers that transformers loads. Out: the tensors of the original files, by name."""
    source = saved(family, tmp_path / "source")
    model = scmoe_ds.from_pretrained(source, whole(1))
    assert type(model) is type(model_of(family)) and model.generation_config is not None
    reference = transformers.AutoModelForCausalLM.from_pretrained(source)
    for name, value in [*reference.named_parameters(), *reference.named_buffers()]:
        assert torch.equal(model.get_parameter_or_buffer(name), value), name
    engine, *_ = scmoe_ds.initialize(model=model, config=whole(1))
    scmoe_ds.save_pretrained(engine, tmp_path / "job", SHARD)
    engine.save_checkpoint(str(tmp_path / "checkpoint"))
    assert main(["export", str(tmp_path / "checkpoint"), str(tmp_path / "out"), "--format", "hf"]) == 0
    for written in (tmp_path / "job", tmp_path / "out"):
        assert_same(written, source)
        assert (written / "config.json").read_bytes() == (source / "config.json").read_bytes()
        assert (written / "tokenizer.json").is_file() and (written / "generation_config.json").is_file()
    assert len(list((tmp_path / "job").glob("*.safetensors"))) > 1
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "job")
    assert all(torch.equal(value, again.get_parameter(name)) for name, value in reference.named_parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_rank_has_its_own_experts_alone(family: str, tmp_path: Path) -> None:
    source = saved(family, tmp_path / "source")
    reference = transformers.AutoModelForCausalLM.from_pretrained(source)
    with mock.patch.object(dist, "get_world_size", return_value=4):
        model: Any = _load(source, str(source), whole(4), OwnExperts(4, 2), "auto", {})
    found = 0
    for name, value in reference.named_parameters():
        own = model.get_parameter(name)
        if ".experts." in name:
            found += 1
            assert own.shape == value.shape
            assert torch.equal(own[4:6], value[4:6]) and not own[:4].any() and not own[6:].any()
        else:
            assert torch.equal(own, value), name
    assert found
    with pytest.raises(ScMoEConfigError, match=r"expert-parallel rank 2 of 4 alone; give the model to scmoe_ds"):
        model(**batch(0, 0))


def _on_two_ranks(source: Path, out: Path, stage: int, precision: dict[str, Any]) -> list[str]:
    config = whole(2, stage, **precision)
    engine, *_ = scmoe_ds.initialize(model=scmoe_ds.from_pretrained(source, config), config=config)
    scmoe_ds.save_pretrained(engine, out / "before", SHARD)
    engine.backward(engine(**batch(0, dist.get_rank())).loss)
    engine.step()
    scmoe_ds.save_pretrained(engine, out / "after", SHARD)
    engine.save_checkpoint(str(out / "checkpoint"))
    messages = []

    def on_a_full_disk() -> None:
        def fail(*_: Any, **__: Any) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        writer = 0 if engine.module.config.model_type.startswith("minimax") else 1
        with mock.patch.object(shards, "save_file", fail if dist.get_rank() == writer else save_file):
            scmoe_ds.save_pretrained(engine, out / "lost", SHARD)

    for attempt in (
        on_a_full_disk,
        lambda: scmoe_ds.save_pretrained(engine, out / "after"),
        lambda: scmoe_ds.initialize(model=scmoe_ds.from_pretrained(source, whole(2)), config=whole(1)),
        lambda: scmoe_ds.from_pretrained(source, whole(3)),
    ):
        with pytest.raises(ValueError) as error:
            attempt()
        messages.append(str(error.value))
    return messages


def _all_on_two_ranks(directory: Path) -> list[list[str]]:
    found = []
    for name, stage, precision in CASES:
        found.append(_on_two_ranks(directory / name, directory / f"out_{name}", stage, precision))
        forget_process_groups()
    return found


CASES: list[tuple[str, int, dict[str, Any]]] = [("deepseek_v3", 3, {}), ("minimax_m3", 2, {"bf16": {"enabled": True}})]
"""minimax_m3's files have fused experts: all ranks' in one tensor."""


def test_two_ranks_write_all_experts(tmp_path: Path) -> None:
    """Before a step the files are the original's, after it a checkpoint's export has what the engine itself writes."""
    for name, _, precision in CASES:
        directory = saved(name, tmp_path / "fp32" / name)
        if precision:
            model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
            model.save_pretrained(tmp_path / name)
        else:
            shutil.copytree(directory, tmp_path / name)
    for messages in run_distributed(_all_on_two_ranks, 2, tmp_path):
        for full, written_over, other_size, odd in messages:
            assert re.search(r"lost: the weights were not written \(model-.*: No space left on device", full)
            assert "after is not empty; name another directory" in written_over
            assert "expert_parallel.autoep_size = 1: the model was loaded for 2" in other_size
            assert "expert_parallel.autoep_size = 3: must divide the world size 2" in odd
    for name, _, precision in CASES:
        out = tmp_path / f"out_{name}"
        export_hugging_face(out / "checkpoint", out / "export", shard_bytes=SHARD)
        assert not list(out.glob("lost*"))
        before, after, export = (tensors(out / part) for part in ("before", "after", "export"))
        own = {key: value.to(before[key].dtype) for key, value in tensors(tmp_path / name).items()}
        assert before.keys() == own.keys() == after.keys() == export.keys()
        assert [key for key in own if not torch.equal(own[key], before[key])] == []
        assert [key for key in own if not torch.equal(after[key], export[key])] == []
        assert all(any(not torch.equal(after[k], own[k]) for k in own if f".experts.{e}." in k) for e in _ids(own))
        if precision:  # the optimizer's weights have more digits, and round to the model's
            export_hugging_face(out / "checkpoint", out / "wide", torch.float32)
            wide = tensors(out / "wide")
            parameters = [key for key in own if "bias" not in key]
            assert all(wide[key].dtype == torch.float32 for key in parameters)
            assert all(torch.equal(wide[key].bfloat16(), after[key]) for key in parameters)
            assert any(not torch.equal(wide[key], after[key].float()) for key in parameters)


def test_frozen_experts_of_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four ranks under ZeRO-3, two of which share the experts: of each weight a rank holds a half."""
    name = "mlp.experts.w1"
    trained = Trained.__new__(Trained)
    trained.path, trained.config, trained._shapes = Path("run"), {}, {}
    trained.layers = {"mlp": {"ep_size": 2, "expert_key_prefix": "mlp.experts"}}
    trained._names = {kind: {rank: str(rank) for rank in range(4)} for kind in ("optim", "model")}
    pieces = {str(rank): torch.tensor([rank % 2 * 10.0 + rank // 2]) for rank in range(4)}
    dense = {str(rank): torch.tensor([float(rank)]) for rank in range(4)}
    files = {
        file: {
            "frozen_param_fragments": {name: pieces[file], "gate": dense[file]},
            "frozen_param_shapes": {name: torch.Size([2]), "gate": torch.Size([4])},
        }
        for file in pieces
    }
    monkeypatch.setattr(trained, "_read", files.get)
    trained._pieces = {}
    trained._index_frozen(trained._pieces)
    assert [trained._assembled(name, ep_rank).tolist() for ep_rank in range(2)] == [[0.0, 1.0], [10.0, 11.0]]
    assert trained._assembled("gate").tolist() == [0.0, 1.0, 2.0, 3.0]


def _ids(names: dict[str, Tensor]) -> list[int]:
    return list(range(EXPERTS)) if any(".experts.0." in name for name in names) else []


def _without_files(directory: Path) -> None:
    for file in directory.glob("*.safetensors*"):
        file.unlink()


def _pickles(directory: Path) -> None:
    _without_files(directory)
    (directory / "pytorch_model.bin").write_bytes(b"")


def _without_a_shard(directory: Path) -> None:
    max(directory.glob("*.safetensors")).unlink()


def _without_an_expert(directory: Path) -> None:
    for file in directory.glob("*.safetensors"):
        save_file({k: v for k, v in load_file(file).items() if ".experts.3.down" not in k}, file)


def _of_another_family(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    other = model_of("mixtral").config.to_dict()
    (directory / "config.json").write_text(json.dumps({**config, **other}))


BAD: dict[str, tuple[Callable[[Path], None], str]] = {
    "no weights": (_without_files, r"holds no model\.safetensors and no model\.safetensors\.index\.json"),
    "pickles": (_pickles, r"its weights are pickles \(pytorch_model\.bin\), .*; save them as safetensors"),
    "a shard is missing": (_without_a_shard, r"model-0000\d-of-0000\d\.safetensors cannot be read"),
    "an expert is missing": (_without_an_expert, r"its weights do not make a Qwen3MoeForCausalLM"),
    "another family": (_of_another_family, r"config\.json and the files must be of one model|of another model"),
}


@pytest.mark.parametrize("case", BAD)
def test_files_that_do_not_fit(case: str, tmp_path: Path, one_process: None) -> None:
    damage, message = BAD[case]
    source = saved("qwen3_moe", tmp_path / "source")
    damage(source)
    with pytest.raises(CheckpointError, match=message) as error:
        scmoe_ds.from_pretrained(source, whole(1))
    assert "\n" not in str(error.value)


def test_what_is_asked_for_does_not_fit(tmp_path: Path, one_process: None) -> None:
    source = saved("qwen3_moe", tmp_path / "source")
    for more, message in {
        "expert_parallel": ({"enabled": False}, r"expert_parallel\.enabled: .*; set it to true"),
        "tensor_parallel": ({"autotp_size": 2}, r"tensor_parallel\.autotp_size = 2: .*; set 1"),
    }.items():
        with pytest.raises(ScMoEConfigError, match=message[1]):
            scmoe_ds.from_pretrained(source, whole(1, **{more: message[0]}))
    with pytest.raises(CheckpointError, match=r'dtype = "fp8": is no dtype of torch'):
        scmoe_ds.from_pretrained(source, whole(1), dtype="fp8")
    theirs = HfDeepSpeedConfig(whole(1, 3))  # in force while it lives
    assert is_deepspeed_zero3_enabled()
    half: Any = scmoe_ds.from_pretrained(source, whole(1), dtype="bfloat16")
    assert {value.dtype for value in half.parameters()} == {torch.bfloat16}
    assert is_deepspeed_zero3_enabled() and theirs.is_zero3()  # as before, but the model is whole
    assert half.lm_head.weight.numel() == half.config.vocab_size * half.config.hidden_size


def test_a_checkpoint_that_says_nothing_of_its_model(
    tmp_path: Path, one_process: None, capsys: pytest.CaptureFixture
) -> None:
    """deepspeed.initialize alone: the directory has to be named, and one of another model is refused."""
    source, other = saved("qwen3_moe", tmp_path / "source"), saved("mixtral", tmp_path / "other")
    model = transformers.AutoModelForCausalLM.from_pretrained(source)
    prepare_autoep(model, whole(1))
    engine, *_ = deepspeed.initialize(model=model, config=whole(1))
    engine.save_checkpoint(str(tmp_path / "checkpoint"))
    with pytest.raises(CheckpointError, match=r"does not say which model it is of; name .* by --model"):
        export_hugging_face(tmp_path / "checkpoint", tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"holds .*q_norm.*, which MixtralForCausalLM does not have; it is of"):
        export_hugging_face(tmp_path / "checkpoint", tmp_path / "out", original=other)
    with pytest.raises(CheckpointError, match=r"--model .*nowhere: no such directory; name the one with"):
        export_hugging_face(tmp_path / "checkpoint", tmp_path / "out", original=tmp_path / "nowhere")
    assert main(["export", str(tmp_path / "checkpoint"), str(tmp_path / "out")]) == 2
    assert "scmoe convert export --format hf writes it" in capsys.readouterr().err
    (tmp_path / "lost").mkdir()
    (tmp_path / "lost" / "zero_pp_rank_1_mp_rank_00_model_states.pt").touch()
    with pytest.raises(CheckpointError, match="lost: has no model file of rank 0"):
        export_hugging_face(tmp_path / "lost", tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.part").exists()
    wider = shutil.copytree(source, tmp_path / "wider")
    config = json.loads((wider / "config.json").read_text())
    (wider / "config.json").write_text(json.dumps({**config, "moe_intermediate_size": 32}))
    with pytest.raises(
        CheckpointError, match=r"experts\.0\.down_proj.*: is \[32, 16\], but \[32, 32\] by the model's config"
    ):
        export_hugging_face(tmp_path / "checkpoint", tmp_path / "out", original=wider)
    export_hugging_face(tmp_path / "checkpoint", tmp_path / "out", original=source)
    assert_same(tmp_path / "out", source)


def test_an_engine_loads_no_checkpoint_of_another_family(tmp_path: Path, one_process: None) -> None:
    for family in ("qwen3_moe", "olmoe"):
        engine, *_ = scmoe_ds.initialize(model=tiny(family), config=whole(1))
        if family == "qwen3_moe":
            engine.save_checkpoint(str(tmp_path))
    with pytest.raises(
        CheckpointError, match="is a checkpoint of Qwen3MoeForCausalLM; the model is a OlmoeForCausalLM"
    ):
        engine.load_checkpoint(str(tmp_path))
    Path(tmp_path, "latest").write_text("nothing")
    with pytest.raises(AssertionError):  # what is no checkpoint stays DeepSpeed's matter
        engine.load_checkpoint(str(tmp_path))


def test_a_converted_model_is_written_with_a_warning(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    """One whose shortcuts only hooks of this package can lay: its function is not what transformers computes."""
    scmoe = {"architecture": "scmoe", "tap": "{block}.input_layernorm:input"}
    origin = {"class": "OlmoeForCausalLM", "config": '{"model_type": "olmoe", "dtype": "float32"}', "directory": None}
    with caplog.at_level(logging.WARNING, logger="scmoe_ds"):
        shards.write_others(tmp_path, origin, None, torch.bfloat16, {"scmoe": scmoe})
    assert "transformers alone computes the unconverted function" in caplog.text
    written = json.loads((tmp_path / "config.json").read_text())
    assert written == {
        "model_type": "olmoe",
        "dtype": "bfloat16",
        "architectures": ["OlmoeForCausalLM"],
        "scmoe": scmoe,
    }

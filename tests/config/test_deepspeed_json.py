"""DeepSpeed's part of the JSON: what it holds is checked before anything starts, and every finding names its path."""

from __future__ import annotations

import copy
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from packaging.version import Version

from scmoe_ds.config.deepspeed_json import load_deepspeed_json
from scmoe_ds.config.deepspeed_keys import known_keys
from scmoe_ds.config.deepspeed_settings import check_accelerator, check_filled_in, check_program, warn
from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.errors import ScMoEConfigError

INFINITY = float("inf")
FROM_0_19_6, FROM_0_19_8 = (
    pytest.mark.skipif(
        Version(deepspeed.__version__) < Version(first), reason=f"DeepSpeed {first} is the first with this key or rule"
    )
    for first in ("0.19.6", "0.19.8")
)
JSON: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 2,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
    "zero_optimization": {"stage": 1},
    "scmoe": {"num_experts": 4},
}


def adam(**params: Any) -> dict[str, Any]:
    return {"optimizer": {"type": "AdamW", "params": {"torch_adam": True, **params}}}


def schedule(name: str, **params: Any) -> dict[str, Any]:
    return {"scheduler": {"type": name, "params": params}}


def zero(**fields: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": 1, **fields}}


# (top-level keys, message): the message begins with the path.
REFUSED: list[Any] = [
    # unknown keys
    (
        {"gradient_acumulation_steps": 2},
        r'gradient_acumulation_steps: unknown key \(did you mean "gradient_accumulation',
    ),
    ({"Gradient_Clipping": 1.0}, r'Gradient_Clipping: unknown key \(did you mean "gradient_clipping"\?\)'),
    ({"zero_optimisation": {"stage": 1}}, r'zero_optimisation: unknown key \(did you mean "zero_optimization"\?\)'),
    ({"ScMoE": {}}, r'ScMoE: unknown key \(did you mean "scmoe"\?\)'),
    (zero(stage=True), r"zero_optimization\.stage = true: must be a number"),
    ({"my_section": {}}, r'my_section: unknown key; .*begin with "_"'),
    ({"tensorboard": {"enable": True}}, r'tensorboard\.enable: unknown key \(did you mean "enabled"\?\)'),
    ({"flops_profiler": {"enabeld": True}}, r'flops_profiler\.enabeld: .*"enabled"'),
    ({"comms_logger": {"verbos": True}}, r'comms_logger\.verbos: .*"verbose"'),
    ({"fp16": {"los_scale": 0}}, r'fp16\.los_scale: .*"loss_scale"'),
    (zero(overlap_com=True), r'zero_optimization\.overlap_com: .*"overlap_comm"'),
    (zero(offload_optimizer={"device": "cpu", "pin_memroy": True}), r'.*offload_optimizer\.pin_memroy: .*"pin_memory"'),
    ({"timers": {"throughput": {"synchronised": True}}}, r'timers\.throughput\.synchronised: .*"synchronized"'),
    ({"data_types": {"grad_acum_dtype": "fp32"}}, r'data_types\.grad_acum_dtype: .*"grad_accum_dtype"'),
    ({"checkpoint": {"tag_validaton": "Warn"}}, r'checkpoint\.tag_validaton: .*"tag_validation"'),
    ({"optimizer": {"type": "AdamW", "parms": {}}}, r'optimizer\.parms: .*"params"'),
    # "auto" that nothing fills in
    ({"train_batch_size": "auto"}, r'train_batch_size = "auto": .*write the value, or remove the key'),
    ({"gradient_accumulation_steps": "auto"}, r'gradient_accumulation_steps = "auto"'),
    ({"gradient_clipping": "auto"}, r'gradient_clipping = "auto"'),
    ({"bf16": {"enabled": "auto"}}, r'bf16\.enabled = "auto"'),
    (zero(reduce_bucket_size="auto"), r'zero_optimization\.reduce_bucket_size = "auto"'),
    (adam(lr="auto"), r'optimizer\.params\.lr = "auto"'),
    (adam(betas="auto"), r"optimizer\.params\.betas = \"auto\": must be a list of 2 numbers"),
    (schedule("WarmupLR", warmup_max_lr="auto"), r'scheduler\.params\.warmup_max_lr = "auto"'),
    ({"tensorboard": {"enabled": False, "job_name": "auto"}}, r'tensorboard\.job_name = "auto"'),
    # quoted and other types
    ({"gradient_clipping": "1"}, r'gradient_clipping = "1": is a string; write 1 without quotes'),
    ({"gradient_clipping": True}, r"gradient_clipping = true: must be a number"),
    ({"gradient_clipping": None}, r"gradient_clipping = null: must be a number"),
    ({"train_micro_batch_size_per_gpu": "2"}, r'train_micro_batch_size_per_gpu = "2": is a string'),
    ({"train_micro_batch_size_per_gpu": 2.5}, r"train_micro_batch_size_per_gpu = 2\.5: must be an integer"),
    ({"wall_clock_breakdown": "true"}, r'wall_clock_breakdown = "true": is a string; write true without quotes'),
    ({"prescale_gradients": 1}, r"prescale_gradients = 1: must be true or false"),
    ({"bf16": {"enabled": "true"}}, r'bf16\.enabled = "true": is a string'),
    ({"bf16": True}, r'bf16 = true: must be an object, such as \{"enabled"'),
    ({"zero_optimization": [1]}, r"zero_optimization = \[1\]: must be an object"),
    ({"zero_optimization": True}, r"zero_optimization = true: must be an object"),
    ({"optimizer": "AdamW"}, r'optimizer = "AdamW": must be an object'),
    ({"optimizer": None}, r"optimizer = null: must be an object"),
    ({"timers": []}, r"timers = \[\]: must be an object"),
    (zero(stage="1"), r'zero_optimization\.stage = "1": is a string; write 1'),
    (zero(reduce_bucket_size="5e8"), r'zero_optimization\.reduce_bucket_size = "5e8": is a string'),
    (zero(reduce_bucket_size=0.5), r"zero_optimization\.reduce_bucket_size = 0\.5: must be an integer"),
    (zero(offload_optimizer="cpu"), r'zero_optimization\.offload_optimizer = "cpu": must be an object'),
    ({"csv_monitor": {"enabled": True, "output_path": 3}}, r"csv_monitor\.output_path = 3: must be a string"),
    ({"flops_profiler": {"profile_step": "5"}}, r'flops_profiler\.profile_step = "5": is a string'),
    ({"comms_logger": {"prof_ops": "all_reduce"}}, r'comms_logger\.prof_ops = "all_reduce": must be a list'),
    ({"log_level": 3}, r"log_level = 3"),
    (adam(lr="1e-3"), r'optimizer\.params\.lr = "1e-3": is a string; write 1e-3 without quotes'),
    (
        adam(betas=["0.9", "0.95"]),
        r"optimizer\.params\.betas = .*must be a list of 2 numbers, such as \[0\.9, 0\.999\]",
    ),
    (adam(fused="yes"), r'optimizer\.params\.fused = "yes"'),
    ({"optimizer": {"type": "AdamW", "params": []}}, r"optimizer\.params = \[\]: must be an object"),
    (schedule("WarmupLR", warmup_max_lr="3e-4"), r'scheduler\.params\.warmup_max_lr = "3e-4": is a string; write 3e-4'),
    # out of range
    ({"steps_per_print": 0}, r"steps_per_print = 0: must be greater than 0"),
    ({"gradient_clipping": -1}, r"gradient_clipping = -1: must be greater than or equal to 0"),
    ({"train_batch_size": 0}, r"train_batch_size = 0: must be greater than 0"),
    ({"gradient_predivide_factor": 0}, r"gradient_predivide_factor = 0: must be greater than 0"),
    ({"flops_profiler": {"profile_step": 0}}, r"flops_profiler\.profile_step = 0"),
    (zero(stage=7), r"zero_optimization\.stage = 7: must be 0, 1, 2 or 3$"),
    pytest.param(zero(reduce_bucket_size=0), r"zero_optimization\.reduce_bucket_size = 0", marks=FROM_0_19_6),
    (
        zero(offload_optimizer={"device": "gpu"}),
        r"zero_optimization\.offload_optimizer\.device = \"gpu\": must be .*'cpu'",
    ),
    ({"fp16": {"loss_scale": -1}}, r"fp16 = .*loss_scale must be >= 0"),
    pytest.param({"gradient_allreduce_op": "max"}, r'gradient_allreduce_op = "max": .*mean', marks=FROM_0_19_6),
    ({"communication_data_type": "int8"}, r'communication_data_type = "int8": .*bf16'),
    ({"data_types": {"grad_accum_dtype": "fp64"}}, r'data_types\.grad_accum_dtype = "fp64": must be'),
    ({"torch_autocast": {"enabled": True, "dtype": "bloat16"}}, r"torch_autocast = .*bloat16"),
    ({"checkpoint": {"tag_validation": "strict"}}, r"checkpoint = .*STRICT"),
    ({"log_level": "loud"}, r"log_level = \"loud\": must be 'debug'"),
    (adam(lr=-1), r"optimizer\.params\.lr = -1: Invalid learning rate"),
    (adam(betas=[0.9, 1.5]), r"optimizer\.params\.betas = \[0\.9, 1\.5\]: Invalid beta"),
    (schedule("WarmupCosineLR", total_num_steps=9, warmup_num_steps=0), r"scheduler\.params\.warmup_num_steps = 0"),
    (schedule("WarmupLR", warmup_type="quad"), r'scheduler\.params\.warmup_type = "quad": must be one of log, linear'),
    (zero(reduce_bucket_size=10**20), r"zero_optimization\.reduce_bucket_size = 10+: is too large"),
    (zero(allgather_bucket_size=7), r"zero_optimization\.allgather_bucket_size = 7: must be even"),
    (schedule("WarmupLR", warmup_min_lr=-1.0), r"scheduler\.params\.warmup_min_lr = -1\.0: must be at least 0"),
    (schedule("WarmupCosineLR", total_num_steps=0), r"scheduler\.params\.total_num_steps = 0: must be at least 1"),
    ({"scmoe": {"capacity_factor": "1e0"}}, r'scmoe\.capacity_factor = "1e0": is a string; write the number'),
    ({"scmoe": {"min_capacity": 10**20}}, r"scmoe\.min_capacity = 10+: is too large"),
    # no numbers
    ({"gradient_clipping": INFINITY}, r"gradient_clipping = Infinity: must be a finite number"),
    (adam(lr=float("nan")), r"optimizer\.params\.lr = NaN: must be a finite number"),
    (zero(reduce_bucket_size=INFINITY), r"zero_optimization\.reduce_bucket_size = Infinity: must be a finite number"),
    # optimizers and schedules
    ({"optimizer": {"type": "Foo"}}, r'optimizer\.type = "Foo": no optimizer of DeepSpeed or torch'),
    (
        {"optimizer": {"type": "OneBitAdam", "params": {}}},
        r'optimizer\.type = "OneBitAdam": no optimizer .*use "AdamW"',
    ),
    ({"optimizer": {"type": "Adm", "params": {}}}, r'optimizer\.type = "Adm": .*use "Adam"'),
    ({"optimizer": {"type": "rmsprop", "params": {}}}, r'optimizer\.type = "rmsprop": .*use "RMSprop"'),
    ({"optimizer": {"params": {}}}, r"optimizer\.type is missing"),
    ({"optimizer": {}}, r"optimizer\.type is missing"),
    (
        {"optimizer": {"type": "SGD", "params": {"lr": 0.1}}},
        r'optimizer\.type = "SGD": .*"zero_allow_untested_optimizer": true',
    ),
    ({"optimizer": {"type": "Adagrad", "params": {"lr": 0.1}}}, r'optimizer\.type = "Adagrad"'),
    ({"optimizer": {"type": "MuAdam", "params": {}}}, r'optimizer\.type = "MuAdam": needs the package mup'),
    (adam(learning_rate=1), r"optimizer\.params\.learning_rate: unknown key; valid keys are .*\blr\b"),
    (adam(weight_decy=1), r'optimizer\.params\.weight_decy: unknown key \(did you mean "weight_decay"\?\)'),
    ({"optimizer": {"type": "AdamW", "params": {"fused": True}}}, r"optimizer\.params\.fused: unknown key"),
    (adam(max_grad_norm=1), r'optimizer\.params\.max_grad_norm = 1: .*"gradient_clipping"'),
    (adam(fused=True, foreach=True), r"optimizer\.params.* = .*fused"),
    ({"scheduler": {}}, r"scheduler\.type is missing"),
    ({"scheduler": {"type": "WarmupLR"}}, r"scheduler\.params is missing"),
    (schedule("WarmupCosine"), r'scheduler\.type = "WarmupCosine": .*use "WarmupCosineLR"'),
    (schedule("WarmupCosineLR", warmup_num_steps=10), r"scheduler\.params\.total_num_steps is missing"),
    (
        schedule("WarmupCosineLR", total_num_steps=9, warmup_max_lr=1.0),
        r"scheduler\.params\.warmup_max_lr: unknown key",
    ),
    (schedule("StepLR", step_size=10), r'scheduler\.type = "StepLR": .*use one of .*WarmupCosineLR'),
    # what DeepSpeed has, and ScMoE cannot run with
    (zero(stage=3), r"zero_optimization\.stage = 3: .*use stage 1 or 2"),
    (zero(reduce_scatter=False), r"zero_optimization\.reduce_scatter = false"),
    (zero(stage=2, contiguous_gradients=False), r"zero_optimization\.contiguous_gradients = false"),
    (zero(compute_grad_norm=False), r"zero_optimization\.compute_grad_norm = false"),
    (zero(zenflow={}), r"zero_optimization\.zenflow = "),
    (zero(mics_shard_size=2), r"zero_optimization\.mics_shard_size: .*remove the key"),
    (zero(cpu_offload=True, offload_optimizer={"device": "cpu"}), r"zero_optimization = .*cpu_offload"),
    ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, r"bf16\.enabled = true: fp16\.enabled is true as well"),
    ({"data_types": {"param_dtype": "bf16"}}, r'data_types\.param_dtype = "bf16": the model is in fp32'),
    ({"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}}, r"bf16\.bf16_master_weights_and_grads = true"),
    (
        {**zero(stage=0), "data_types": {"grad_accum_dtype": "bf16"}},
        r"data_types\.grad_accum_dtype = \"bf16\": .*stage to 1",
    ),
    ({"compile": {"deepcompile": True}}, r"compile\.deepcompile = true"),
    ({"hybrid_engine": {"enabled": True}}, r"hybrid_engine\.enabled = true"),
    ({"autotuning": {"enabled": True}}, r"autotuning\.enabled = true"),
    ({"data_efficiency": {"enabled": True}}, r"data_efficiency\.enabled = true"),
    ({"tensor_parallel": {"autotp_size": 2}}, r"tensor_parallel\.autotp_size = 2: .*--tensor-model-parallel-size"),
    ({"sequence_parallel_size": 2}, r"sequence_parallel_size = 2"),
    ({"use_data_before_expert_parallelism": True}, r"use_data_before_expert_parallelism = true"),
    ({"weight_quantization": {}}, r"weight_quantization = "),
    ({"datastates_ckpt": {}}, r"datastates_ckpt = "),
    ({"checkpoint": {"writer": {"type": "FAST"}}}, r"checkpoint\.writer = "),
    ({"checkpoint": {"load_universal": True}}, r"checkpoint\.load_universal = true: .*--load"),
    (
        {"zero_optimization": {"stage": 1, "elastic_checkpoint": True}},
        r"zero_optimization\.elastic_checkpoint = true: .*no run can go on",
    ),
    ({"checkpoint": {"use_node_local_storage": True}}, r"checkpoint\.use_node_local_storage = true"),
    *[
        ({name: {"enabled": True}}, rf"{name}\b.*remove the key")
        for name in (
            "amp",
            "elasticity",
            "curriculum_learning",
            "sparse_attention",
            "compression_training",
            "progressive_layer_drop",
            "eigenvalue",
            "nebula",
            "quantize_training",
        )
    ],
]

ACCEPTED: list[Any] = [
    {},
    {"_comment": "mine"},
    {"train_batch_size": None, "gradient_accumulation_steps": 4},
    {"steps_per_print": INFINITY},  # as Accelerate writes it
    {"steps_per_print": 2000},
    {"gradient_clipping": 0},
    {"prescale_gradients": True, "gradient_predivide_factor": 2},
    {"communication_data_type": "fp32", "seq_parallel_communication_data_type": "fp32"},
    {"wall_clock_breakdown": True, "memory_breakdown": False, "dump_state": False, "disable_allgather": True},
    {"dataloader_drop_last": True, "vocabulary_size": 50304, "log_level": "WARNING"},
    {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32", "param_dtype": "bf16"}},
    pytest.param({"data_types": {"keep_in_fp32_modules": "auto"}}, marks=FROM_0_19_8),
    {
        "fp16": {
            "enabled": True,
            "loss_scale": 0,
            "initial_scale_power": 16,
            "loss_scale_window": 1000,
            "hysteresis": 2,
            "consecutive_hysteresis": False,
            "min_loss_scale": 1,
        }
    },
    {"torch_autocast": {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": ["torch.nn.Linear"]}},
    {
        "flops_profiler": {
            "enabled": True,
            "profile_step": 1,
            "module_depth": -1,
            "top_modules": 1,
            "detailed": True,
            "output_file": None,
        }
    },
    {"comms_logger": {"enabled": True, "verbose": False, "prof_all": True, "debug": False, "prof_ops": ["all_reduce"]}},
    {"timers": {"throughput": {"enabled": True, "synchronized": True}}},
    {"tensorboard": {"enabled": True, "output_path": "x", "job_name": "y"}, "csv_monitor": {"enabled": True}},
    {"wandb": {"enabled": False, "team": None, "project": "p"}, "comet": {"enabled": False}},
    {"checkpoint": {"tag_validation": "Warn", "parallel_write": {"pipeline_stage": False}}},
    {"aio": {"block_size": 1048576, "queue_depth": 8, "single_submit": False, "overlap_events": True}},
    {"data_efficiency": {"enabled": False}, "hybrid_engine": {"enabled": False}, "autotuning": {"enabled": False}},
    {"compile": {"deepcompile": False}, "pipeline": {}, "activation_checkpointing": {"profile": False}},
    zero(
        stage=2,
        reduce_bucket_size=5e8,
        allgather_bucket_size=5e8,
        overlap_comm=True,
        contiguous_gradients=True,
        round_robin_gradients=True,
        offload_optimizer={"device": "cpu", "pin_memory": True},
    ),
    zero(
        offload_optimizer={"device": "none", "nvme_path": None},
        offload_param={"device": "none"},
        stage3_prefetch_bucket_size="auto",
        stage3_param_persistence_threshold="auto",
    ),
    adam(lr=6e-4, betas=[0.9, 0.95], eps=1e-8, weight_decay=0.1, fused=True),
    adam(lr=1, adam_w_mode=False),
    {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "bias_correction": True}}},
    {"optimizer": {"type": "adamw", "params": {"lr": 1e-3}}, **zero(offload_optimizer={"device": "cpu"})},
    {"optimizer": {"type": "Lion", "params": {"lr": 1e-3, "betas": [0.9, 0.99]}}},
    {"optimizer": {"type": "Muon", "params": {"muon_lr": 1e-3, "adam_lr": 1e-3, "momentum": 0.9}}},
    {"optimizer": {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}}, "zero_allow_untested_optimizer": True},
    schedule("WarmupCosineLR", total_num_steps="auto", warmup_num_steps=10, cos_min_ratio=0.1, warmup_type="linear"),
    schedule("WarmupDecayLR", total_num_steps=100, warmup_min_lr=0, warmup_max_lr=1e-3),
    schedule("WarmupLR", warmup_max_lr=[1e-3, 1e-4, 1e-3, 1e-4]),
    schedule("OneCycle", cycle_min_lr=1e-4, cycle_max_lr=1e-3),
    schedule("LRRangeTest"),
]


def read(change: dict[str, Any]) -> ScMoEConfig:
    return ScMoEConfig.from_deepspeed({**copy.deepcopy(JSON), **change})


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=lambda value: json.dumps(value)[:60])
def test_a_finding_names_its_path(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ScMoEConfigError) as error:
        read(change)
    assert len(str(error.value).splitlines()) == 1
    assert re.match(message, str(error.value))


@pytest.mark.parametrize("change", ACCEPTED, ids=lambda value: json.dumps(value)[:60])
def test_what_runs_is_accepted(change: dict[str, Any]) -> None:
    read(change)


def test_all_findings_at_once() -> None:
    with pytest.raises(ScMoEConfigError) as error:
        read({"scmoe": {"top_k": 9}, "gradient_clipping": "1", "zero_optimization": {"stge": 1}, **schedule("Warm")})
    paths = [re.split("[ :]", line)[0] for line in str(error.value).splitlines()]
    assert paths == ["scmoe.top_k", "zero_optimization.stge", "gradient_clipping", "scheduler.type"]


def test_keys_are_those_of_the_installed_deepspeed() -> None:
    """The attributes that DeepSpeed keeps of a JSON are read from keys of the same names, with few exceptions."""
    attributes = set(vars(deepspeed.DeepSpeedConfig({"train_micro_batch_size_per_gpu": 1})))
    same = {
        "train_batch_size",
        "gradient_accumulation_steps",
        "steps_per_print",
        "prescale_gradients",
        "pipeline",
        "communication_data_type",
        "gradient_clipping",
        "zero_allow_untested_optimizer",
        "wall_clock_breakdown",
        "memory_breakdown",
        "hybrid_engine",
        "dataloader_drop_last",
        "dump_state",
        "log_level",
    }
    assert same <= attributes & known_keys().keys()
    assert known_keys()["zero_optimization"].keys() > {"stage", "overlap_comm", "stage3_prefetch_bucket_size"}
    assert known_keys()["flops_profiler"].keys() >= {"enabled", "profile_step", "module_depth", "output_file"}
    assert known_keys()["gradient_predivide_factor"] is not Any
    assert {"wandb", "comet", "tensorboard", "csv_monitor", "nebula", "timers"} < known_keys().keys()


@pytest.mark.parametrize(
    ("monitor", "package", "install"),
    [
        ("wandb", "wandb", "wandb"),
        ("comet", "comet_ml", "comet_ml"),
        ("tensorboard", "tensorboard", '"scmoe_ds[plots]"'),
    ],
)
def test_a_monitor_without_its_package(
    monitor: str, package: str, install: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else found(name))
    message = f"{monitor}.enabled = true: needs the package {package}; pip install {install}, or set it to false"
    with pytest.raises(ScMoEConfigError, match=f"^{re.escape(message)}$"):
        read({monitor: {"enabled": True}})
    read({monitor: {"enabled": False}})  # the remedy


def test_what_only_the_programs_refuse(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for key, value, message in (
        ("managed_gradient_accumulation", False, "managed_gradient_accumulation = false"),
        ("csv_monitor", {"enabled": True, "output_path": str(tmp_path / "file" / "x")}, "csv_monitor.output_path"),
        ("flops_profiler", {"enabled": True, "output_file": "/proc/x/y"}, "flops_profiler.output_file = .*/proc/x/y"),
    ):
        read({key: value})
        with pytest.raises(ScMoEConfigError, match=message):
            check_program({**JSON, key: value})
    check_program({**JSON, "flops_profiler": {"enabled": True, "output_file": str(tmp_path / "file")}})
    check_program({**JSON, "csv_monitor": {"enabled": True, "output_path": str(tmp_path / "new")}})


def test_what_the_device_decides() -> None:
    if torch.cuda.is_available():
        pytest.skip("rules of a CPU")
    for optimizer in ({"type": "Lamb"}, {"type": "lion"}, {"type": "AdamW", "params": {"capturable": True}}):
        with pytest.raises(ScMoEConfigError, match=r"^optimizer\.(type|params\.capturable) = "):
            check_accelerator({"optimizer": optimizer})


def test_the_length_of_the_schedule_has_to_be_known() -> None:
    with pytest.raises(ScMoEConfigError, match=r'^scheduler\.params\.total_num_steps = "auto": .*write the number'):
        check_filled_in({**JSON, **schedule("WarmupCosineLR", total_num_steps="auto")})
    check_filled_in({**JSON, **schedule("WarmupCosineLR", total_num_steps=10)})


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({}, "gradient_clipping is not set: DeepSpeed clips gradients at a norm of 1.0"),
        (
            {"aio": {"queue_depth": 8}, **zero(zero_hpz_partition_size=8)},
            "zero_optimization.zero_hpz_partition_size, aio: no effect",
        ),
        ({"gradient_clipping": 0}, None),
    ],
)
def test_what_the_log_says(change: dict[str, Any], line: str | None, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "scmoe_ds"):
        warn({**JSON, **change})
    said = [record.message for record in caplog.records if "clips" in record.message or "no effect" in record.message]
    assert any(each.startswith(line) for each in said) if line else not said


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{"scmoe": {}, "zero_optimization": {"stage": 1, "stage": 2}}',
            r"^Duplicate keys in the DeepSpeed JSON: zero_optimization\.stage; keep",
        ),
        ('{"scmoe": {}, "a": [{"b": 1, "b": 2}], "scmoe": {}}', r"^Duplicate keys .*: scmoe, a\.0\.b; keep"),
        ('{"gradient_clipping": ' + "9" * 5000 + "}", r"not valid JSON"),
        ("[" * 100000, r"nested too deeply"),
        ("[1]", r"must be an object"),
        ('{"a": 1,}', r"not valid JSON .*trailing commas"),
    ],
)
def test_a_file_that_is_no_json(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(text)
    with pytest.raises(ScMoEConfigError, match=message):
        load_deepspeed_json(path)


def test_constants_that_python_reads_are_found(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text('\ufeff{"scmoe": {"num_experts": 4}, "gradient_clipping": NaN, "aio": {"queue_depth": 1e999}}')
    with pytest.raises(
        ScMoEConfigError, match=r"gradient_clipping = NaN: .*finite number\naio\.queue_depth = Infinity"
    ):
        ScMoEConfig.from_deepspeed(path)

"""A row of the plan as a DeepSpeed JSON, and the command that starts its training."""

from __future__ import annotations

import copy
import json
import math
import shlex
from pathlib import Path
from typing import Any

from scmoe_ds.programs.plan_question import Question
from scmoe_ds.simulate.method import Method
from scmoe_ds.simulate.model import Model
from scmoe_ds.simulate.rows import samples_of
from scmoe_ds.simulate.search import Run

_FRESH: dict[str, Any] = {
    "steps_per_print": 1000000,
    "optimizer": {
        "type": "AdamW",
        "params": {
            "lr": 3e-4,
            "betas": [0.9, 0.95],
            "eps": 1e-8,
            "weight_decay": 0.1,
            "torch_adam": True,
            "fused": True,
        },
    },
    "gradient_clipping": 1.0,
}
"""What a JSON has that nobody gave; the rest is the row's."""
_OF_METHODS = """architecture position first_layer_position shortcut_distance join top_k merge dispatch shortcut_norm
    post_norm overlap pairs_per_moe expert_parallel_size expert_partition adapt""".split()
"""Fields of the section that another method than the JSON's may not have."""


def config_of(question: Question, run: Run) -> dict[str, Any]:
    """The DeepSpeed JSON of a row: the given one, or a fresh one, with the row's values."""
    layout, whole = run.layout, copy.deepcopy(dict(question.whole or _FRESH))
    whole |= {
        "train_batch_size": samples_of(run),
        "train_micro_batch_size_per_gpu": layout.micro_batch,
        "gradient_accumulation_steps": layout.accumulation,
        "zero_optimization": {**whole.get("zero_optimization", {}), "stage": layout.zero_stage},
    }
    for name in ("bf16", "fp16"):
        whole.pop(name, None) if name != layout.precision else whole.setdefault(name, {}).update(enabled=True)
    given = whole.get("scmoe", {})
    if question.model.autoep:
        whole["expert_parallel"] = {
            **whole.get("expert_parallel", {}),
            "enabled": True,
            "autoep_size": layout.expert_parallel,
        }
        whole["scmoe"] = _autoep_section(question.model, run.method)
    else:
        kept = {name: value for name, value in given.items() if name not in _OF_METHODS}
        whole["scmoe"] = {**_own_section(question.model, run), **kept}
    return whole


def _own_section(model: Model, run: Run) -> dict[str, Any]:
    method, stage = run.method, next(each for each in model.stages if each.experts is not None)
    experts = stage.experts
    assert experts is not None
    numbers = stage.moe_layers
    section: dict[str, Any] = {
        "architecture": _architecture(method),
        "moe_every": numbers[1] - numbers[0] if len(numbers) > 1 else stage.layers,
        "num_experts": experts.num_experts,
        "expert_parallel_size": run.layout.expert_parallel,
        "top_k": routed(model, method),
    }
    if method.architecture == "scmoe":
        section |= {"position": method.position, "merge": method.merge}
        section |= {"join": "late"} if method.join == "late" else {}
    if not model.images:
        section |= {"moe_ffn_hidden_size": experts.hidden} if experts.hidden != stage.mlp_hidden else {}
    return section | {"overlap": {"enabled": method.overlap}} if method.layer == "scmoe_ds" else section


def _architecture(method: Method) -> str:
    if method.layer == "deepspeed":
        return method.architecture
    return {"topk": "pipelined_topk", "shared_expert": "overlapped_shared_expert"}.get(method.architecture, "scmoe")


def _autoep_section(model: Model, method: Method) -> dict[str, Any]:
    if method.architecture != "scmoe":
        return {"architecture": "as_is", "overlap": {"enabled": method.overlap}}
    section: dict[str, Any] = {"architecture": "scmoe", "position": method.position}
    section |= {"join": "late"} if method.join == "late" else {}
    stage = next(each for each in model.stages if each.experts is not None)
    if stage.experts is not None and not stage.experts.shared_hidden:
        section |= {"top_k": routed(model, method), "adapt": {"shared_expert": "mean"}}
    return {**section, "overlap": {"enabled": True}}


def routed(model: Model, method: Method) -> int:
    """Routed experts of a token."""
    experts = next(each.experts for each in model.stages if each.experts is not None)
    added = method.architecture != "topk" and not experts.shared_hidden
    return method.routed or experts.top_k - added


def write_config(question: Question, run: Run, path: Path) -> None:
    """Writes the JSON."""
    path.write_text(json.dumps(config_of(question, run), indent=2) + "\n", "utf-8")


def launch_lines(question: Question, run: Run, path: Path | None) -> list[str]:
    """How a training of the row is started."""
    cluster, layout, model = question.cluster, run.layout, question.model
    config = str(path or question.args.deepspeed_config or "DS_CONFIG.json")
    launcher = ["deepspeed"]
    launcher += ["--hostfile", "HOSTFILE"] if cluster.nodes > 1 else ["--num_gpus", str(cluster.gpus_per_node)]
    if model.autoep:
        command = [*launcher, "YOUR_TRAINING.py"]
        notes = [f'its model: scmoe_ds.from_pretrained("{question.args.model}", "{config}"), then scmoe_ds.initialize']
        notes += ["activation checkpointing: model.gradient_checkpointing_enable()"] if layout.recompute else []
    else:
        of_a_step = samples_of(run) * (1 if model.images else model.stages[0].tokens)
        iterations = "N" if question.args.tokens is None else str(math.ceil(question.tokens / of_a_step))
        program = ["--module", "scmoe_ds.programs.pretrain_swin"] if model.images else ["pretrain_gpt_scmoe.py"]
        command = [*launcher, *program, *model_flags(question), "--deepspeed_config", config]
        tensor = layout.tensor_parallel
        command += ["--tensor-model-parallel-size", str(tensor)] if tensor > 1 else []
        command += ["--recompute-granularity", str(layout.recompute)] if layout.recompute else []
        command += ["--data-path", "DATA", "--train-iters", iterations]
        notes = []
    if cluster.nodes > 1:
        notes.append(f'HOSTFILE: {cluster.nodes} lines such as "worker-0 slots={cluster.gpus_per_node}"')
    first = f"start {run.method.name} (--write makes its JSON):" if path is None else f"start {run.method.name}:"
    return [first, f"  {shlex.join(command)}", *(f"  {note}" for note in notes)]


def model_flags(question: Question) -> list[str]:
    """The flags of the command line that say which model it is, as a training takes them."""
    names = """preset num_layers hidden_size ffn_hidden_size num_attention_heads num_key_value_heads seq_length swiglu
        vocab_size""".split()
    found = []
    for name in names:
        value = getattr(question.args, name, None)
        if value not in (None, False):
            found += ["--" + name.replace("_", "-"), *([] if value is True else [str(value)])]
    return found

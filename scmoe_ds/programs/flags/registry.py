"""The programs of the `scmoe` command. Their modules are imported when they are needed: torch takes seconds."""

from __future__ import annotations

from importlib import import_module
from typing import Any, NamedTuple


class Program(NamedTuple):
    """A program's module and that with the `build_parser` of its flags, both in scmoe_ds.programs; what it does.

    Whether it needs DeepSpeed: `scmoe plan` runs where neither that nor torch is installed.
    """

    module: str
    flags: str
    text: str
    needs_deepspeed: bool = True


PROGRAMS = {
    "pretrain": Program("pretrain_gpt", "flags.gpt", "train a GPT with ScMoE layers"),
    "pretrain-swin": Program("pretrain_swin", "flags.swin", "train a SwinV2-MoE with ScMoE layers"),
    "generate": Program("generate", "flags.generate", "generate text with a trained GPT"),
    "evaluate": Program("evaluate", "flags.evaluate", "loss, perplexity and lm_eval tasks of a trained GPT"),
    "analyze": Program(
        "analyze", "flags.analysis", "similarity, gating and gradients of a trained model; would ScMoE pay for it?"
    ),
    "dashboard": Program("dashboard", "flags.dashboard", "a page that shows how training runs go or went"),
    "report": Program("report", "flags.report", "is a step faster with ScMoE on this machine, and why? Times steps"),
    "check": Program("check", "flags.check", "would a training run, and fit? One step without a GPU"),
    "probe": Program("probe", "flags.probe", "what does this machine compute and send? A profile for scmoe plan"),
    "plan": Program("plan", "flags.plan", "what would train fastest on a cluster that is not here? No torch", False),
    "sparsify": Program("sparsify", "flags.sparsify", "what can a trained MoE leave out? Sorts neurons, calibrates"),
    "preprocess": Program("preprocess", "flags.preprocess", "text to Megatron's indexed datasets"),
    "adapt": Program("adapt", "flags.adapt", "a trained MoE model as a ScMoE, with the same weights"),
    "convert": Program("convert", "flags.convert", "weights out of a checkpoint, as safetensors"),
}
"""The word behind `scmoe`, in the order of the help."""


def parser_of(program: str) -> Any:
    """The FlagParser of a program. Imports no torch."""
    return import_module(f"scmoe_ds.programs.{PROGRAMS[program].flags}").build_parser()

"""SwinV2-MoE: sizes against the paper, shortcuts against values picked up by hand, training."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from deepspeed.moe.layer import MoE
from torch import Tensor

from lab.distributed import run_distributed
from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.data.images import Digits
from scmoe_ds.errors import ScMoEConfigError
from scmoe_ds.models.swin import IGNORED, SwinMoE, initialize_swin
from scmoe_ds.models.swin_settings import SwinSettings
from scmoe_ds.programs import pretrain_swin as pretrain_swin_program
from scmoe_ds.programs.flags.swin import parse_image_arguments, swin_settings
from scmoe_ds.replace.layer import HookedScMoE

ROOT = Path(__file__).resolve().parents[2]
CONFIG = str(ROOT / "ds_configs" / "swin_digits_cpu.json")
SMALL = SwinSettings(16, 4, 8, (1, 1, 4, 2), (1, 1, 2, 2), num_classes=10, patch_size=1, num_channels=1)
VARIANTS: dict[str, dict[str, Any]] = {
    "topk": {"architecture": "topk"},
    "shared_expert": {"architecture": "shared_expert"},
    "pos1": {"position": "pos1"},
    "pos2": {"position": "pos2"},
    "pos3": {"position": "pos3"},
    "raw": {"shortcut_norm": "shared"},
}


def section(**fields: Any) -> ScMoEConfig:
    return ScMoEConfig.from_deepspeed({"scmoe": {"num_experts": 2, "drop_tokens": False, **fields}})


def make(settings: SwinSettings = SMALL, **fields: Any) -> SwinMoE:
    model = SwinMoE(settings, section(**fields))
    initialize_swin(model, seed=1)
    return model


# --- padding


@pytest.mark.parametrize("variant", ["topk", "shared_expert", "pos2"])
def test_images_that_fill_a_batch_change_nothing(variant: str) -> None:
    """In evaluation, with a capacity for which the other images would fight with them."""
    fields = {
        **VARIANTS[variant],
        "drop_tokens": True,
        "eval_capacity_factor": 0.6,
        "min_capacity": 1,
        "use_rts": False,
    }
    alone, filled = make(**fields).eval(), make(**fields).eval()
    images = torch.randn(5, 1, 16, 16, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([3, 1, 4, IGNORED, IGNORED])
    for _ in range(2):  # the first pass looks for operators
        with torch.no_grad():
            expected, found = alone(images[:3], labels[:3]), filled(images, labels)
        torch.testing.assert_close(found.logits[:3], expected.logits, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.loss, expected.loss)
        assert all(torch.equal(a, b) for a, b in zip(found.exp_counts, expected.exp_counts, strict=True))


# --- table 9

PAPER = {"swinv2-moe-s": (96, [3, 6, 12, 24], 49.7e6, 157e6), "swinv2-moe-b": (128, [4, 8, 16, 32], 87.9e6, None)}
"""Embedding, heads; SwinV2-S and -B as published; top-2 with 8 experts as in the paper's A.7, which has -S alone."""
DEPTHS, EXPERTS = [2, 2, 18, 2], 8


def dense_parameters(width: int, heads: list[int], classes: int = 1000) -> int:
    """A SwinV2 without experts, counted by hand: patches of 4 × 4 × 3, blocks, mergings, last norm, head."""
    total = 4 * 4 * 3 * width + width + 2 * width
    for stage, (depth, count) in enumerate(zip(DEPTHS, heads, strict=True)):
        d = width * 2**stage
        attention = 4 * d * d + 3 * d + count + 2 * 512 + 512 + 512 * count  # keys have no bias; scale; position MLP
        total += depth * (attention + mlp_parameters(d) + 4 * d)
        total += 4 * d * 2 * d + 4 * d if stage < 3 else 2 * d
    return total + 8 * width * classes + classes


def mlp_parameters(d: int) -> int:
    return 8 * d * d + 5 * d


@pytest.mark.parametrize("name", PAPER)
def test_models_are_those_of_table_9(name: str) -> None:
    width, heads, published, with_experts = PAPER[name]
    flags = ["--preset", name, "--train-iters", "1", "--deepspeed_config", CONFIG]
    settings = swin_settings(parse_image_arguments(flags)[0])
    assert (settings.image_size, settings.window_size, settings.patch_size) == (192, 12, 4)
    assert (settings.embed_dim, list(settings.depths), list(settings.num_heads)) == (width, DEPTHS, heads)
    dense = dense_parameters(width, heads)
    assert abs(dense - published) < 0.05e6
    with torch.device("meta"):
        models = {
            each: SwinMoE(settings, section(architecture=each, num_experts=EXPERTS))
            for each in ("topk", "shared_expert", "scmoe")
        }
    places = [(2, block) for block in range(1, 18, 2)] + [(3, 1)]
    gates, experts = (
        [count(4 * 2 ** (stage - 2) * width) for stage, _ in places]
        for count in (lambda d: EXPERTS * d, lambda d: (EXPERTS - 1) * mlp_parameters(d))
    )
    counted = {each: sum(parameter.numel() for parameter in model.parameters()) for each, model in models.items()}
    assert counted["topk"] == dense + sum(gates) + sum(experts)
    assert with_experts is None or abs(counted["topk"] - with_experts) < 0.5e6
    shared = [mlp_parameters(4 * 2 ** (stage - 2) * width) for stage, _ in places]
    cg2 = [2 * 4 * 2 ** (stage - 2) * width + 2 for stage, _ in places]
    assert counted["shared_expert"] == counted["topk"] + sum(shared) + sum(cg2)
    # In stage 3 alone: shared expert, a coefficient with one output, a norm for the shortcut.
    assert counted["scmoe"] == counted["topk"] + sum(shared[:9]) + 9 * (4 * width + 1) + 9 * 2 * 4 * width
    for model in models.values():
        assert moe_places(model) == places
        assert [feed.moe.deepspeed_moe.gate.wg.in_features for feed in model.feeds()] == [4 * width] * 9 + [8 * width]


def moe_places(model: SwinMoE) -> list[tuple[int, int]]:
    stages = model.swin.encoder.layers
    return [
        (stage, block)
        for stage in range(4)
        for block, each in enumerate(stages[stage].blocks)
        if any(isinstance(module, MoE) for module in each.modules())
    ]


def test_what_the_models_compute() -> None:
    """Two experts a token everywhere: routed, or routed and shared; the shortcut in stage 3 alone."""
    kinds = {}
    for architecture in ("topk", "shared_expert", "scmoe"):
        layers = [feed.moe for feed in make(architecture=architecture).feeds()]
        kinds[architecture] = [
            (isinstance(layer, HookedScMoE), layer.deepspeed_moe.gate.k, layer.use_residual) for layer in layers
        ]
    assert kinds == {
        "topk": [(False, 2, False)] * 3,
        "shared_expert": [(False, 1, True)] * 3,
        "scmoe": [(True, 1, True)] * 2 + [(False, 2, False)],
    }
    pyramid = make(num_experts=[2, 4, 6])
    assert [feed.moe.num_experts for feed in pyramid.feeds()] == [2, 4, 6]


# --- shortcuts


@pytest.mark.parametrize("variant", ["pos1", "pos2", "pos3", "raw"])
def test_routed_experts_read_the_raw_stream_at_the_position(variant: str) -> None:
    """Values are picked up by hooks of the test; both the first pass and the one in pieces are compared."""
    model = make(**VARIANTS[variant]).eval()
    before, block = model.swin.encoder.layers[2].blocks[2:]
    seen: dict[str, Tensor] = {}
    for name, module in (("pos3", before), ("pos2", before.intermediate), ("pos1", block), ("own", block.intermediate)):
        module.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0]}))
    block.intermediate.register_forward_hook(lambda _, args, output: seen.update(output=output))
    layer = block.intermediate.moe
    for seed in (1, 2):
        model(torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(seed)))
        tap = seen["pos2" if variant == "raw" else variant]
        shortcut = tap if variant == "raw" else torch.nn.functional.layer_norm(tap, tap.shape[-1:], eps=1e-5)
        expected, _, _ = layer(seen["own"], shortcut=shortcut)
        assert (expected - seen["output"]).abs().max() <= 1e-6
        wrong, _, _ = layer(seen["own"], shortcut=seen["own"])
        assert (wrong - seen["output"]).abs().max() > 1e-5


# --- training


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_learns_and_every_parameter_gets_a_gradient(variant: str) -> None:
    model, data = make(**VARIANTS[variant]), Digits(16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
    without = {name for name, _ in model.named_parameters()}
    losses = []
    for step in range(20):
        torch.manual_seed(step)  # DeepSpeed's gates draw random numbers
        output = model(data.images[:48], data.labels[:48])
        assert output.loss is not None and output.class_loss is not None
        optimizer.zero_grad()
        output.loss.backward()
        without -= {name for name, each in model.named_parameters() if each.grad is not None and each.grad.any()}
        optimizer.step()
        losses.append(float(output.class_loss.detach()))
    assert not without
    assert losses[-1] < losses[0] - 0.4 and losses[0] == pytest.approx(np.log(10), abs=0.5)
    assert [int(each.sum()) for each in output.exp_counts] == [tokens_routed(feed.moe) for feed in model.feeds()]
    assert output.logits.shape == (48, 10)


def tokens_routed(layer: MoE) -> int:
    """Stage 3 has 4 × 4 tokens of an image and is 32 wide, stage 4 has 2 × 2."""
    return 48 * (16 if layer.deepspeed_moe.gate.wg.in_features == 32 else 4) * layer.deepspeed_moe.gate.k


def test_images_without_a_label_do_not_count() -> None:
    model, data = make(architecture="topk").eval(), Digits(16)
    labels = data.labels[:8].clone()
    labels[4:] = IGNORED
    output = model(data.images[:8], labels)
    expected = torch.nn.functional.cross_entropy(output.logits[:4], labels[:4])
    assert output.class_loss is not None and abs(output.class_loss.item() - expected.item()) <= 1e-6
    assert model(data.images[:2], torch.full((2,), IGNORED)).class_loss.item() == 0.0


@pytest.mark.parametrize("variant", ["topk", "pos2"])
def test_parameters_in_bf16_as_an_engine_makes_them(variant: str) -> None:
    model, data = make(**VARIANTS[variant]), Digits(16)
    whole = model.eval()(data.images[:8], data.labels[:8])
    for parameter in model.parameters():  # buffers stay in fp32
        parameter.data = parameter.data.bfloat16()
    half = model(data.images[:8], data.labels[:8])
    assert half.logits.dtype == torch.bfloat16 and half.loss.dtype == torch.float32
    half.loss.backward()
    assert abs(float(whole.class_loss.detach() - half.class_loss.detach())) < 0.05


def run_script(directory: str, *flags: str) -> tuple[int, dict[str, Any]]:
    """scmoe pretrain-swin on this rank; the state of the run, where one was made."""
    os.chdir(directory)
    found: dict[str, Any] = {}
    trainer = pretrain_swin_program.ImageTrainer

    class Watched(trainer):  # type: ignore[misc, valid-type]
        def run(self) -> Any:
            summary = super().run()
            found.update(
                first=self.first,
                last=summary.iteration,
                loss=summary.validation_loss,
                accuracy=self.log.accuracy,
                ep_size=self.engine.module.feeds()[0].moe.ep_size,
            )
            return summary

        def _train(self, *args: Any) -> bool:
            self.first = self.iteration
            return super()._train(*args)

    pretrain_swin_program.ImageTrainer = Watched  # type: ignore[misc]
    sizes = [
        "--img-size",
        "16",
        "--patch-dim",
        "1",
        "--window-size",
        "4",
        "--embed-dim",
        "8",
        "--depths",
        "1",
        "1",
        "2",
        "2",
        "--num-heads",
        "1",
        "1",
        "2",
        "2",
        "--num-channels",
        "1",
        "--num-classes",
        "10",
    ]
    code = pretrain_swin_program.main([*sizes, "--dataset", "digits", "--deepspeed_config", CONFIG, *flags])
    return code, found


def test_trains_saves_and_resumes_expert_parallel(tmp_path: Path) -> None:
    """Four steps at EP 1 against two steps at EP 2, a save, and two more. No stochastic depth: the first forward pass
    of a process draws its numbers in another order than those in which the shortcut starts at the tap."""
    flags = ["--train-iters", "4", "--disable-moe-token-dropping", "--split", "10,5", "--drop-path-rate", "0"]
    runs = {}
    for name, more in {
        "whole": [],
        "half": ["--moe-expert-parallel-size", "2", "--exit-interval", "2", "--save", "saved"],
        "rest": ["--moe-expert-parallel-size", "2", "--load", "saved"],
    }.items():
        (code, found), (other_code, other) = run_distributed(run_script, 2, str(tmp_path), *flags, *more)
        assert (code, other_code) == (0, 0)
        assert found["loss"] == other["loss"]
        runs[name] = found
    assert [runs[name]["ep_size"] for name in runs] == [1, 2, 2]
    assert (runs["half"]["last"], runs["rest"]["first"], runs["rest"]["last"]) == (2, 2, 4)
    assert abs(runs["whole"]["loss"] - runs["rest"]["loss"]) <= 1e-5 < abs(runs["whole"]["loss"] - runs["half"]["loss"])
    assert 0 <= runs["rest"]["accuracy"] <= 1


# --- bad input


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"architecture": "dgmoe"}, '"dgmoe": a SwinV2-MoE is one of topk, shared_expert, scmoe'),
        ({"join": "late"}, 'scmoe.join = "late": the norms of a Swin end its branches, .*; set end'),
        ({"moe_every": 5}, r"moe_every = 5: stage 3 has 4 block\(s\) and no MoE then"),
        ({"num_experts": [2, 2]}, "needs 3 numbers, one per MoE layer"),
    ],
)
def test_bad_sections(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ScMoEConfigError, match=message):
        make(**fields)


def test_images_of_another_size_are_refused() -> None:
    model = make(architecture="topk")
    with pytest.raises(ValueError, match=r"images of shape \(2, 1, 8, 8\): the model wants \[batch, 1, 16, 16\]"):
        model(torch.zeros(2, 1, 8, 8))

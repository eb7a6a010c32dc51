"""SwinV2-MoE: sizes against the paper, shortcuts against values picked up by hand, training, images, bad input."""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from deepspeed.moe.layer import MoE
from PIL import Image
from torch import Tensor

import pretrain_swin_scmoe
from benchmarks import digits
from scmoe_ds.argument_checks import ArgumentError
from scmoe_ds.config import ScMoEConfig, ScMoEConfigError
from scmoe_ds.data.errors import DataError
from scmoe_ds.data.images import Digits, Epochs, ImageFolder, Padded, load_images, split_in_two
from scmoe_ds.image_arguments import parse_image_arguments, swin_settings
from scmoe_ds.models.swin import IGNORED, SwinMoE, initialize_swin
from scmoe_ds.models.swin_settings import SWIN_PRESETS, SwinSettings
from scmoe_ds.replace.convert import HookedScMoE
from tests.helpers.distributed import run_distributed

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
        models = {each: SwinMoE(settings, section(architecture=each, num_experts=EXPERTS))
                  for each in ("topk", "shared_expert", "scmoe")}  # fmt: skip
    places = [(2, block) for block in range(1, 18, 2)] + [(3, 1)]
    gates, experts = ([count(4 * 2 ** (stage - 2) * width) for stage, _ in places]
                      for count in (lambda d: EXPERTS * d, lambda d: (EXPERTS - 1) * mlp_parameters(d)))  # fmt: skip
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
    return [(stage, block) for stage in range(4) for block, each in enumerate(stages[stage].blocks)
            if any(isinstance(module, MoE) for module in each.modules())]  # fmt: skip


def test_what_the_models_compute() -> None:
    """Two experts a token everywhere: routed, or routed and shared; the shortcut in stage 3 alone."""
    kinds = {}
    for architecture in ("topk", "shared_expert", "scmoe"):
        layers = [feed.moe for feed in make(architecture=architecture).feeds()]
        kinds[architecture] = [(isinstance(layer, HookedScMoE), layer.deepspeed_moe.gate.k, layer.use_residual)
                               for layer in layers]  # fmt: skip
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
    assert output.class_loss is not None and abs(float(output.class_loss - expected)) <= 1e-6
    assert float(model(data.images[:2], torch.full((2,), IGNORED)).class_loss) == 0.0  # type: ignore[arg-type]


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
    """pretrain_swin_scmoe.py on this rank; the state of the run, where one was made."""
    os.chdir(directory)
    found: dict[str, Any] = {}
    trainer = pretrain_swin_scmoe.ImageTrainer

    class Watched(trainer):  # type: ignore[misc, valid-type]
        def run(self) -> Any:
            summary = super().run()
            found.update(first=self.first, last=summary.iteration, loss=summary.validation_loss,
                         accuracy=self.log.accuracy, ep_size=self.engine.module.feeds()[0].moe.ep_size)  # fmt: skip
            return summary

        def _train(self, *args: Any) -> bool:
            self.first = self.iteration
            return super()._train(*args)

    pretrain_swin_scmoe.ImageTrainer = Watched  # type: ignore[misc]
    sizes = ["--img-size", "16", "--patch-dim", "1", "--window-size", "4", "--embed-dim", "8", "--depths", "1", "1", "2",
             "2", "--num-heads", "1", "1", "2", "2", "--num-channels", "1", "--num-classes", "10"]  # fmt: skip
    code = pretrain_swin_scmoe.main([*sizes, "--dataset", "digits", "--deepspeed_config", CONFIG, *flags])
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


# --- images


def write_images(root: Path, sizes: dict[str, list[tuple[int, int]]]) -> Path:
    for name, images in sizes.items():
        (root / name).mkdir(parents=True)
        for number, size in enumerate(images):
            Image.new("RGB", size, (number, 0, 255)).save(root / name / f"{number}.png")
    return root


def test_image_folder(tmp_path: Path) -> None:
    root = write_images(tmp_path / "set", {"b": [(8, 8), (20, 10)], "a": [(3, 5)]})
    folder = ImageFolder(root, 8)
    assert folder.classes == ("a", "b") and len(folder) == 3
    assert [int(folder[index]["labels"]) for index in range(3)] == [0, 1, 1]
    for index, red in enumerate([0, 0, 1]):
        image = folder[index]["images"]
        assert image.shape == (3, 8, 8)
        expected = torch.tensor([red / 127.5 - 1, -1.0, 1.0]).reshape(3, 1, 1).expand(3, 8, 8)
        assert torch.equal(image, expected)
    assert ImageFolder(root, 8, num_channels=1)[0]["images"].shape == (1, 8, 8)
    parts = write_images(tmp_path / "parts" / "train", {"b": [(8, 8)], "a": [(8, 8)]}).parent
    write_images(parts / "val", {"b": [(8, 8)]})
    sets = load_images(str(parts), "folder", 8, 3, 2, "80,20", 0)
    assert sets.classes == ("a", "b") and int(sets.valid[0]["labels"]) == 1


def test_order_split_and_padding() -> None:
    data = Digits(8)
    assert data.images.shape == (1797, 1, 8, 8) and (data.images.min(), data.images.max()) == (-1, 1)
    train, valid = split_in_two(data, "80,20", 3, "digits")
    assert sorted([*train.members, *valid.members]) == list(range(1797)) and len(valid) == 359
    assert split_in_two(data, "80,20", 3, "digits")[1].members == valid.members
    assert split_in_two(data, "80,20", 4, "digits")[1].members != valid.members
    labels = [int(train[index]["labels"]) for index in range(len(train))]
    twice = Epochs(train, 2 * len(train), seed=0)
    first, second = ([int(twice[index]["labels"]) for index in range(start, start + len(train))]
                     for start in (0, len(train)))  # fmt: skip
    assert first != second and sorted(first) == sorted(second) == sorted(labels)
    padded = Padded(valid, 64, IGNORED)
    assert len(padded) == 384
    assert [int(padded[index]["labels"]) for index in range(359, 384)] == [IGNORED] * 25
    assert int(padded[358]["labels"]) >= 0


# --- bad input


def swin_flags(*flags: str) -> list[str]:
    return ["--preset", "swin-digits", "--train-iters", "1", "--deepspeed_config", CONFIG, *flags]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--patch-dim", "3"], "--img-size 16 must be divisible by --patch-dim 3"),
        (["--img-size", "20"], r"gives 20 tokens a side, which 3 stage boundaries cannot halve; use a multiple of 8"),
        (["--window-size", "3"], r"--window-size 3 must divide the 16 tokens a side of stage 1"),
        (["--num-heads", "3", "2", "4", "8"], "stage 1 is 16 wide, which 3 heads do not divide"),
        (["--depths", "1", "0", "4", "2"], r"--depths \[1, 0, 4, 2\]: each must be at least 1"),
        (["--drop-path-rate", "1"], r"--drop-path-rate 1.0: must be in \[0, 1\)"),
        (["--recompute-granularity", "full"], "are for the GPT; leave them out"),
        (["--log-interval", "0"], "--log-interval 0: must be at least 1"),
    ],
)
def test_bad_flags(flags: list[str], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        swin_settings(parse_image_arguments(swin_flags(*flags))[0])


def test_missing_sizes_are_named() -> None:
    with pytest.raises(ArgumentError, match="--img-size is missing"):
        parse_image_arguments(["--train-iters", "1", "--deepspeed_config", CONFIG])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"architecture": "dgmoe"}, '"dgmoe": a SwinV2-MoE is one of topk, shared_expert, scmoe'),
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


def test_bad_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(directory: Path | None, classes: int = 10, split: str = "80,20", **fields: Any) -> Any:
        settings = {"dataset": "folder", "num_channels": 3, **fields}
        name = None if directory is None else str(directory)
        return load_images(name, settings["dataset"], 8, settings["num_channels"], classes, split, 0)

    good = write_images(tmp_path / "good", {"a": [(8, 8)] * 4, "b": [(8, 8)] * 4})
    (tmp_path / "empty" / "a").mkdir(parents=True)
    broken = write_images(tmp_path / "broken", {"a": [(8, 8)]})
    (broken / "a" / "0.png").write_bytes(b"no image")
    cases = [
        (lambda: load(None), "--data-path is missing"),
        (lambda: load(tmp_path / "none"), "none: no such directory"),
        (lambda: load(tmp_path / "empty"), r"empty: no images in it; they are expected as .*<class>/<image>"),
        (lambda: load(good, classes=1), "2 classes in .*; set --num-classes 2"),
        (lambda: load(good, split="1,0"), "of the 8 images of .* leaves none for validation"),
        (lambda: load(good, num_channels=2), r"--num-channels 2: images have 1 \(grey\) or 3"),
        (lambda: load(None, dataset="digits"), "--num-channels 3: the digits are grey; use 1"),
        (lambda: ImageFolder(broken, 8)[0], r"0\.png: cannot be read as an image .*; remove or replace it"),
    ]
    for call, message in cases:
        with pytest.raises(DataError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match="needs scikit-learn: pip install scikit-learn"):
        Digits(8)


@pytest.mark.parametrize("flags", [["--dataset", "folder"], ["--scmoe-position", "pos9"]])
def test_the_program_ends_in_one_sentence(flags: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) if "pos9" in flags else nullcontext():
        assert pretrain_swin_scmoe.main(swin_flags("--deepspeed_config", "none.json", *flags)) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if "error:" in line]
    assert len(lines) == 1 and ("none.json" in lines[0] or "pos9" in lines[0])


# --- the table of digits


def test_every_row_of_the_table_is_a_command_line_that_parses() -> None:
    assert SWIN_PRESETS["swin-digits"]["dataset"] == "digits"
    found = {}
    for variant in digits.VARIANTS:
        flags = digits.flags_of(variant, seed=1, iterations=5)
        flags[flags.index("--deepspeed_config") + 1] = CONFIG
        args, _, config = parse_image_arguments(flags[1:])
        assert (args.seed, args.train_iters) == (1, 5)
        found[variant] = (config.architecture, config.position)
    assert found["top-2"][0] == "topk" and found["shared expert"][0] == "shared_expert"
    assert [found[f"ScMoE Pos-{n}"] for n in (1, 2, 3)] == [("scmoe", f"pos{n}") for n in (1, 2, 3)]


def test_the_table_has_mean_and_range() -> None:
    text = "\nfinished at iteration 5\n  accuracy      96.10 % of the validation images, loss 0.2000 nats\n"
    runs = [digits.last_lines(text), digits.last_lines(text.replace("96.10", "97.10").replace("0.2", "0.4"))]
    record = {"command": "c", "environment": {}, "seeds": [1, 2], "iterations": 5,
              "rows": [{"variant": "top-2", "runs": runs}]}  # fmt: skip
    assert "| top-2 | 96.60 | 96.10–97.10 | 0.300 |" in digits.markdown(record)
    with pytest.raises(RuntimeError, match="no result"):
        digits.last_lines("finished")

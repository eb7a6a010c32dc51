"""Images, the command line of scmoe pretrain-swin and the table of digits; models: test_swin.py."""

from __future__ import annotations

import shutil
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from benchmarks.quality import digits
from scmoe_ds.data.images import Digits, Epochs, ImageFolder, Padded, load_images, split_in_two
from scmoe_ds.errors import ArgumentError, DataError, UserError
from scmoe_ds.models.swin import IGNORED
from scmoe_ds.models.swin_settings import SWIN_PRESETS
from scmoe_ds.programs import pretrain_swin as pretrain_swin_program
from scmoe_ds.programs.flags.swin import parse_image_arguments, swin_settings

CONFIG = str(Path(__file__).resolve().parents[2] / "ds_configs" / "swin_digits_cpu.json")


def write_images(root: Path, sizes: dict[str, list[tuple[int, int]]]) -> Path:
    for name, images in sizes.items():
        (root / name).mkdir(parents=True)
        for number, size in enumerate(images):
            Image.new("RGB", size, (number, 0, 255)).save(root / name / f"{number}.png")
    return root


def test_image_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = write_images(tmp_path / "set", {"b": [(8, 8), (20, 10)], "a": [(3, 5)]})
    folder = ImageFolder(root, 8)
    assert folder.classes == ("a", "b") and len(folder) == 3
    assert [int(folder[index]["labels"]) for index in range(3)] == [0, 1, 1]
    for index, red in enumerate([0, 0, 1]):
        image = folder[index]["images"]
        assert image.shape == (3, 8, 8)
        expected = torch.tensor([red / 127.5 - 1, -1.0, 1.0]).reshape(3, 1, 1).expand(3, 8, 8)
        assert torch.equal(image, expected)
    (root / "a" / "0.png").write_bytes((root / "a" / "0.png").read_bytes() + b"more")
    assert ImageFolder(root, 8).fingerprint != folder.fingerprint, "another file of the same name"
    assert ImageFolder(root, 8, num_channels=1)[0]["images"].shape == (1, 8, 8)
    parts = write_images(tmp_path / "parts" / "train", {"b": [(8, 8)], "a": [(8, 8)]}).parent
    write_images(parts / "val", {"b": [(8, 8)]})
    sets = load_images(str(parts), "folder", 8, 3, 2, "80,20", 0)
    assert sets.classes == ("a", "b") and int(sets.valid[0]["labels"]) == 1
    shutil.rmtree(parts / "val")
    (parts / "train" / "b" / "notes.md").touch()
    alone = load_images(str(parts), "folder", 8, 3, 2, "80,20", 0)
    assert alone.classes == ("a", "b") and alone.valid is None and "no val/" in str(alone.no_validation)
    assert [record.message.partition(" in ")[0] for record in caplog.records] == ["1 file(s)"]
    assert "notes.md" in caplog.text


def test_order_split_and_padding() -> None:
    data = Digits(8)
    assert data.images.shape == (1797, 1, 8, 8) and (data.images.min(), data.images.max()) == (-1, 1)
    train, valid = split_in_two(data, "80,20", 3, "digits")
    assert sorted([*train.indices, *valid.indices]) == list(range(1797)) and len(valid) == 359
    assert split_in_two(data, "80,20", 3, "digits")[1].indices == valid.indices
    assert split_in_two(data, "80,20", 4, "digits")[1].indices != valid.indices
    labels = [int(train[index]["labels"]) for index in range(len(train))]
    twice = Epochs(train, 2 * len(train), seed=0)
    first, second = (
        [int(twice[index]["labels"]) for index in range(start, start + len(train))] for start in (0, len(train))
    )
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
        (["--log-interval", "0"], "--log-interval 0: must be at least 1"),
    ],
)
def test_bad_flags(flags: list[str], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        swin_settings(parse_image_arguments(swin_flags(*flags))[0])


def test_missing_sizes_are_named() -> None:
    with pytest.raises(
        ArgumentError, match="--img-size, --window-size, --embed-dim, --depths, --num-heads are missing"
    ):
        parse_image_arguments(["--train-iters", "1", "--deepspeed_config", CONFIG])


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
        (lambda: load(good, split="100,1"), "of the 8 images of .* leaves none for validation"),
        (lambda: load(good, num_channels=2), r"--num-channels 2: images have 1 \(grey\) or 3"),
        (lambda: load(None, dataset="digits"), "--num-channels 3: the digits are grey; use 1"),
        (lambda: ImageFolder(broken, 8)[0], r"0\.png: cannot be read as an image .*; remove or replace it"),
    ]
    for call, message in cases:
        with pytest.raises(DataError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(UserError, match=r'digits needs sklearn: pip install "scmoe_ds\[images\]"'):
        Digits(8)


@pytest.mark.parametrize("flags", [["--dataset", "folder"], ["--scmoe-position", "pos9"]])
def test_the_program_ends_in_one_sentence(flags: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) if "pos9" in flags else nullcontext():
        assert pretrain_swin_program.main(swin_flags("--deepspeed_config", "none.json", *flags)) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if "error:" in line]
    assert len(lines) == 1 and ("none.json" in lines[0] or "pos9" in lines[0])


# --- the table of digits


def test_every_row_of_the_table_is_a_command_line_that_parses() -> None:
    assert SWIN_PRESETS["swin-digits"]["dataset"] == "digits"
    found = {}
    for variant in digits.VARIANTS:
        flags = digits.flags_of(variant, seed=1, iterations=5)
        flags[flags.index("--deepspeed_config") + 1] = CONFIG
        args, config = parse_image_arguments(flags[2:])
        assert (args.seed, args.train_iters) == (1, 5)
        found[variant] = (config.section.architecture, config.section.position)
    assert found["top-2"][0] == "topk" and found["shared expert"][0] == "shared_expert"
    assert [found[f"ScMoE Pos-{n}"] for n in (1, 2, 3)] == [("scmoe", f"pos{n}") for n in (1, 2, 3)]


def test_the_table_has_mean_and_range() -> None:
    text = (
        "finished at iteration 5: 9 images per second\n  accuracy 96.10 % of the validation images, loss 0.2000 nats\n"
    )
    runs = [digits.last_lines(text), digits.last_lines(text.replace("96.10", "97.10").replace("0.2", "0.4"))]
    record = {
        "command": "c",
        "environment": {},
        "seeds": [1, 2],
        "iterations": 5,
        "rows": [{"variant": "top-2", "runs": runs}],
    }
    assert "| top-2 | 96.60 | 96.10–97.10 | 0.300 |" in digits.markdown(record)
    with pytest.raises(RuntimeError, match="no result"):
        digits.last_lines("finished")

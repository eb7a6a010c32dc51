"""Checkpoints, exports, times and records from before 0.1.0 (tests/fixtures/before_0_1) load, and give the old numbers."""

from __future__ import annotations

import json
import pickletools
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from scmoe_ds.checkpoint.tensor_files import read
from scmoe_ds.engine import connect
from scmoe_ds.planner.calibration_file import find_times
from scmoe_ds.planner.plan import plan
from scmoe_ds.programs import analyze, convert, evaluate, generate, preprocess, pretrain_gpt, pretrain_swin
from scmoe_ds.training.record import RunRecord, read_record

FIXTURES = Path(__file__).parents[1] / "fixtures" / "before_0_1"
EXPECTED = json.loads((FIXTURES / "expected.json").read_text())
GPT_FLAGS = (
    "--deepspeed_config gpt.json --num-layers 4 --hidden-size 8 --num-attention-heads 2 --seq-length 16 "
    "--hidden-dropout 0 --attention-dropout 0 --init-method-std 0.2 --make-vocab-size-divisible-by 1 "
    "--tokenizer-type GPT2BPETokenizer --vocab-file vocab.json --merge-file merges.txt "
    "--data-path corpus_text_document --split 80,20,0 --data-cache-path cache --train-iters 8 --log-interval 1"
)
SWIN_FLAGS = (
    "--deepspeed_config swin.json --dataset digits --img-size 8 --patch-dim 1 --window-size 4 --embed-dim 2 "
    "--depths 1 1 2 2 --num-heads 1 1 2 2 --num-classes 10 --num-channels 1 --drop-path-rate 0 "
    "--init-method-std 0.2 --train-iters 5 --log-interval 1 --eval-iters 2"
)

PROGRESS = ("iteration", "consumed samples", "last validation that passed")
"""What a checkpoint's description says of how far the run has come."""


@pytest.fixture(scope="module", autouse=True)
def world_of_one() -> None:
    connect()


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to work in: the files name each other by relative paths."""
    directory = tmp_path / "old"
    shutil.copytree(FIXTURES, directory)
    monkeypatch.chdir(directory)
    return directory


def succeed(main: Callable[[list[str]], int], command: str) -> None:
    assert main(command.split()) == 0, command


def check_record(directory: Path, expected: dict[str, list[float]]) -> None:
    """What a run's record says of its two steps and of the validation."""
    found = numbers(read_record(directory))
    assert len(found["loss"]) == 2, found
    for name, values in expected.items():
        # The old log printed a rate with four digits.
        assert found[name] == (pytest.approx(values, rel=5e-4) if name == "rate" else close(values)), name


def numbers(run: RunRecord) -> dict[str, list[float]]:
    names = {"loss": run.loss_name, "moe loss": "moe_loss", "rate": "learning_rate", "norm": "grad_norm"}
    found = {name: run.curve(column)[1] for name, column in names.items()}
    return {**found, "validation": run.curve(run.loss_name, "validations")[1]}


def close(expected: Any) -> Any:
    return pytest.approx(expected, rel=1e-5)


def test_the_checkpoint_goes_on_in_another_layout(old: Path) -> None:
    """From two ranks to one, whose two micro-batches are the two ranks'. The sample index is that of the old files."""
    index = {file.name: file.stat().st_mtime_ns for file in (old / "cache").iterdir()}
    succeed(pretrain_gpt.main, f"{GPT_FLAGS} --eval-iters 4 --load gpt --save new")
    check_record(old / "new", EXPECTED["resumed gpt"])
    assert {file.name: file.stat().st_mtime_ns for file in (old / "cache").iterdir()} == index
    check_pickles(old / "new")
    files = old / "new" / "global_step8" / "scmoe.json", old / "gpt" / "global_step6" / "scmoe.json"
    check_description(*files, "layout", "expert_parallel_size", *PROGRESS)
    saved = read(old / "new" / "global_step8" / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    states = saved["optimizer_state_dict"]["base_optimizer_state"]["state"].values()
    assert {float(state["step"]) for state in states} == {8.0}


@pytest.mark.slow
def test_the_swin_checkpoint_goes_on_in_its_layout(old: Path) -> None:
    """Through DeepSpeed's own loader."""
    succeed(pretrain_swin.main, f"{SWIN_FLAGS} --load swin --save new")
    check_record(old / "new", EXPECTED["resumed swin"])
    check_pickles(old / "new")
    files = old / "new" / "global_step5" / "scmoe.json", old / "swin" / "global_step3" / "scmoe.json"
    check_description(*files, *PROGRESS)


@pytest.mark.parametrize("source", ["gpt", "export"])
def test_weights_compute_the_same(source: str, old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, flags in (("text", "--text-file sample.txt"), ("data", "--data-path corpus_text_document")):
        succeed(evaluate.main, f"--load {source} {flags} --output found.json")
        found = json.loads((old / "found.json").read_text())["results"]
        then = EXPECTED["evaluated"][name]
        assert {key: found[key] for key in then} == close(then), name
    capsys.readouterr()
    succeed(generate.main, f"--load {source} --prompt The --max-new-tokens 12 --temperature 0")
    assert capsys.readouterr().out == EXPECTED["generated"]


def test_the_export_is_what_is_exported_now(old: Path) -> None:
    succeed(convert.main, "export gpt new")
    weights, then = (load_file(old / name / "model-00001-of-00001.safetensors") for name in ("new", "export"))
    assert weights.keys() == then.keys() and all(torch.equal(weights[name], then[name]) for name in then)
    check_description(old / "new" / "config.json", old / "export" / "config.json")


def test_the_corpus_is_what_is_made_now(old: Path) -> None:
    succeed(
        preprocess.main,
        "--input corpus.jsonl --output-prefix new --append-eod --tokenizer-type GPT2BPETokenizer "
        "--vocab-file vocab.json --merge-file merges.txt",
    )
    for end in ("bin", "idx"):
        assert (old / f"new_text_document.{end}").read_bytes() == (old / f"corpus_text_document.{end}").read_bytes()


@pytest.mark.parametrize("name", EXPECTED["planned"])
def test_times_give_the_schedules_that_they_gave(name: str) -> None:
    if name == "checkpoint":
        saved = read(FIXTURES / "gpt" / "global_step6" / "mp_rank_00_model_states.pt")["overlap"]
    else:
        saved = json.loads((FIXTURES / name).read_text())
    times = find_times(saved, [entry["description"] for entry in saved], (1, 2, 4), name)
    for each, then in zip(times, EXPECTED["planned"][name], strict=True):
        for mode in ("train", "forward"):
            found = plan(each, mode)
            assert list(found.schedule.slots) == then[mode]["slots"]
            assert found.predicted.total_ms == close(then[mode]["total ms"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("record", "flags"),
    [
        ("similarity", "--load gpt --text-file sample.txt"),
        ("swin_similarity", "--load swin --images digits --max-images 8"),
    ],
)
def test_an_analysis_finds_what_it_found(record: str, flags: str, old: Path) -> None:
    succeed(analyze.main, f"similarity {flags} --output new.json")
    then, now = (json.loads((old / f"{name}.json").read_text()) for name in (record, "new"))
    assert now.keys() >= then.keys() and now["names"] == then["names"] and now["tokens"] == then["tokens"]
    cosines = [np.array(found["cosine"], dtype=float) for found in (now, then)]  # between widths that differ: NaN
    np.testing.assert_allclose(*cosines, rtol=1e-5)
    succeed(analyze.main, f"similarity --from-json {record}.json")
    assert (old / f"{record}.png").read_bytes().startswith(b"\x89PNG")


def test_a_page_is_not_made_of_old_records(old: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """They do not say which model they are of."""
    flags = "feasibility --similarity similarity.json --calibration times.json --output-prefix page".split()
    assert analyze.main(flags) == 2
    message = r"error: --similarity similarity\.json does not say which model it is of: .* run the analysis again$"
    assert re.search(message, capfd.readouterr().err)
    assert not (old / "page.md").exists()


def test_no_pickle_names_a_module_of_this_package() -> None:
    for directory in ("gpt", "swin"):
        check_pickles(FIXTURES / directory)


def check_description(now: Path, then: Path, *free: str) -> None:
    """All that an old description says but the free keys is said in the same words now; a new one may say more."""

    def check(now: Any, then: Any, key: str) -> None:
        if isinstance(then, dict):
            for key in then.keys() - set(free):
                check(now[key], then[key], key)
        else:
            assert now == then, key

    check(json.loads(now.read_text()), json.loads(then.read_text()), "")


def check_pickles(directory: Path) -> None:
    names = set()
    for file in directory.rglob("*.pt"):
        with zipfile.ZipFile(file) as archive:
            for member in archive.namelist():
                if member.endswith(".pkl"):
                    operations = pickletools.genops(archive.read(member))
                    names |= {str(argument) for operation, argument, _ in operations if "GLOBAL" in operation.name}
    assert "torch._utils _rebuild_tensor_v2" in names, "nothing was looked at"
    # A class of this package in a pickle would tie the checkpoint to the module that the class is in.
    assert not [name for name in names if name.startswith("scmoe_ds")]

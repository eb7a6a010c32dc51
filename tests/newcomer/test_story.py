"""A newcomer's first day, in the order of README and docs. Read it as a story; each test goes on where the last one ended.

The text is the repository's own documentation. Sizes are tiny, one process trains. `make newcomer` tells the story in an
environment that is installed anew.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import scmoe_ds
from scmoe_ds.engine import connect
from scmoe_ds.training.record import read_record
from tests.docs.pages import steps
from tests.newcomer.shell import IS_LONG, ROOT, Terminal, install

TOKENIZER = "--vocab-file vocab.json --merge-file merges.txt"
SIZES = "--num-layers 4 --hidden-size 32 --num-attention-heads 2 --seq-length 32 --log-interval 1 --eval-iters 1"
TRAIN = f"scmoe pretrain {SIZES} {TOKENIZER} --data-path data/corpus_text_document --split 80,15,5 --train-iters 2000"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    directory, before = tmp_path_factory.mktemp("newcomer"), Path.cwd()
    os.chdir(directory)
    connect()
    yield directory
    os.chdir(before)


@pytest.fixture(scope="module")
def programs(home: Path) -> Path | None:
    return install(home) if IS_LONG else None


@pytest.fixture
def terminal(home: Path, programs: Path | None, capfd: pytest.CaptureFixture[str]) -> Terminal:
    return Terminal(home, programs, capfd)


def losses(directory: str) -> dict[int, float]:
    """What a run has recorded, with all digits."""
    return {iteration: step["lm_loss"] for iteration, step in read_record(directory).steps.items()}


def last_save(directory: str) -> int:
    return int(Path(directory, "latest").read_text().removeprefix("global_step"))


def test_1_the_package_is_there(terminal: Terminal) -> None:
    assert scmoe_ds.__version__ in terminal.do("scmoe --version")
    for program in ("pretrain", "preprocess", "generate", "dashboard"):
        assert program in terminal.do("scmoe --help")


def test_2_text_of_my_own_with_a_tokenizer_of_my_own(terminal: Terminal) -> None:
    pages = [*ROOT.glob("docs/*.md"), *ROOT.glob("*.md"), *ROOT.glob("ds_configs/*.md"), *ROOT.glob("examples/*.md")]
    Path("texts").mkdir()
    for page in pages:
        shutil.copy(page, Path("texts", page.stem + ".txt"))
    in_the_docs = next(step.text for step in steps("docs/data.md") if step.kind == "python")
    Path("tokenizer.py").write_text(in_the_docs)
    terminal.do("python tokenizer.py")
    said = terminal.do(f"scmoe preprocess --input texts --output-prefix data/corpus --append-eod {TOKENIZER}")
    assert f"{len(list(Path('texts').iterdir()))} documents" in said
    first = min(Path("texts").iterdir()).read_text()
    assert repr(first[:30])[1:-1] in said  # the first document, decoded; which quotes depends on the rest


def test_3_training_stops_at_ctrl_c_and_goes_on_with_the_same_losses(terminal: Terminal) -> None:
    whole = json.loads((ROOT / "ds_configs/gpt_small_cpu.json").read_text())
    whole["scmoe"]["expert_parallel_size"] = 1
    Path("ds.json").write_text(json.dumps(whole, indent=2))
    training = f"{TRAIN} --deepspeed_config ds.json --save-interval 5"

    process = terminal.start(f"{training} --save interrupted --auto-resume")
    deadline = time.monotonic() + 300
    while not Path("interrupted/latest").exists() and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) != 0

    saved = last_save("interrupted")
    assert 5 <= saved < 2000
    terminal.do(f"{training} --save interrupted --auto-resume --exit-interval {saved + 5}")
    terminal.do(f"{training} --save straight --exit-interval {saved + 5}")
    found, expected = losses("interrupted"), losses("straight")
    assert len(expected) == saved + 5
    assert found == expected
    assert expected[saved + 5] < expected[1]


def test_4_another_architecture_is_one_line_of_json(terminal: Terminal) -> None:
    text = Path("ds.json").read_text()
    Path("top2.json").write_text(text.replace('"architecture": "scmoe"', '"architecture": "topk"'))
    said = terminal.do(f"{TRAIN} --deepspeed_config top2.json --save top2 --exit-interval 5")
    assert "topk" in said
    assert losses("top2")[5] != losses("straight")[5]


def test_5_the_model_writes_and_is_judged(terminal: Terminal) -> None:
    terminal.do("scmoe convert export straight weights")
    written = []
    for where in ("straight", "weights"):
        said = terminal.do(f'scmoe generate --load {where} --prompt "The expert" --max-new-tokens 8 --temperature 0')
        written.append([line for line in said.splitlines() if line.startswith("The expert")])
    assert len(written[0][0]) > len("The expert") and written[0] == written[1]
    terminal.do(
        "scmoe evaluate --load weights --data-path data/corpus_text_document --split 80,15,5 --output quality.json"
    )
    assert json.loads(Path("quality.json").read_text())


def test_6_would_it_pay(terminal: Terminal) -> None:
    data = "--data-path data/corpus_text_document"
    terminal.do(f"scmoe analyze similarity --load straight {data} --max-tokens 500 --output similarity.json")
    terminal.do(f"scmoe analyze gating --load straight {data} --output gating.json")
    terminal.do(f"scmoe analyze gradients --load straight --load top2 {data} --micro-batches 2 --output gradients.json")
    whole = json.loads((ROOT / "ds_configs/gpt_small_cpu.json").read_text())
    whole["scmoe"]["overlap"] = {"calibration_file": "times.json"}
    Path("two_ranks.json").write_text(json.dumps(whole))
    terminal.do_on_two_ranks("scmoe_ds.programs.report", f"{SIZES} {TOKENIZER} --deepspeed_config two_ranks.json")
    records = "--similarity similarity.json --calibration times.json"
    assert "pay" in terminal.do(f"scmoe analyze feasibility {records} --output-prefix answer")
    for name in ("similarity.png", "gating.png", "gradients.png", "answer.md", "answer.png", "answer.html"):
        assert Path(name).stat().st_size > 1000, name


def test_7_the_run_on_one_page(terminal: Terminal) -> None:
    terminal.do("scmoe dashboard straight top2 --output compare.html")
    assert "straight" in Path("compare.html").read_text()


def test_8_a_model_whose_names_nobody_knows(terminal: Terminal) -> None:
    shutil.copy(ROOT / "tests/newcomer/own_model.py", "own_model.py")
    said = terminal.do("python own_model.py")
    assert "storeys" in said and "calm_two" in said  # what was replaced, and where it taps
    first, last = (float(loss) for loss in re.findall(r"^step \d+: loss ([\d.]+)$", said, re.MULTILINE))
    assert last < 0.7 * first

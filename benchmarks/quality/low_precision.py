"""What low precision on overloaded ranks costs in quality: a vision-language model and text, by the run-time path.

    python -m benchmarks.quality.low_precision --output benchmarks/results

Two ranks hold half of the experts each (gloo). Vision-language models are those of examples/vision_language.py, with
and without its balancing loss; they are trained if they are not there. Text models are those of
benchmarks.quality.sparse_models, where --text has them. Gates are as trained, or prefer their first expert until it has
1.8 or 4 times the mean load. Patches tolerate low precision; of text, the choices with the lowest gate scores do. Each
row is the same model on the same held-out sequences. Rows of 4 bits round weights and activations of hot ranks to 15
values each, about as coarse as the paper's NVFP4; no device computes so here.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.harness.measure import environment
from benchmarks.harness.skewed_gates import Loads, count_loads, first_expert, over_ranks, skew_gates
from benchmarks.quality.crew import ROOT
from benchmarks.quality.low_precision_page import markdown
from benchmarks.quality.run import held_out_rows
from lab.distributed import environment_of_one, run_distributed
from scmoe_ds.data.digit_questions import DigitQuestions
from scmoe_ds.data.sampler import pretraining_batches
from scmoe_ds.evaluation.answers import score_answers
from scmoe_ds.evaluation.scoring import Scorer
from scmoe_ds.inference.load import load_trained
from scmoe_ds.inference.low_precision import use_low_precision
from scmoe_ds.models.gpt import GPT
from scmoe_ds.models.vision_language import VisionLanguageGPT
from scmoe_ds.moe.decisions.low_precision import LowPrecision
from scmoe_ds.moe.decisions.low_precision_formats import Int8
from scmoe_ds.parallel.agreement import gather
from scmoe_ds.parallel.groups import Layout

RANKS, BATCH = 2, 32
VISION = {"balanced": "Vision-language", "free": "Vision-language, trained without a balancing loss"}
SKEWS = (None, 1.8, 4.0)
SHARES = (0.0, 0.7, 0.9)
"""M_d of the paper's ablation."""
TOLERANT_SHARE = 0.75
"""Of a text's choices, those with the lowest scores: more than the recommended M_d, as the patches of a prompt are."""
OFF, ALL, COARSE = "off", "low precision everywhere", "4 bits: "
Group = Callable[[], tuple[float, float | None]]


class FourBits(Int8):
    """Values of 4 bits, computed as int8."""

    largest = 7.0


def row_settings(score: float | None) -> dict[str, LowPrecision | None]:
    """The rows of a table."""
    used = {f"ReaLB, M_d {share:g}": LowPrecision("hot", score, share) for share in SHARES}
    used[ALL] = LowPrecision("all", score)
    coarse = {COARSE + name: settings for name, settings in used.items()}
    return {OFF: None, "off again (A/A)": None, **used, **coarse}


@dataclass
class Subject:
    """A model on this rank, and what it is evaluated on.

    Attributes:
        groups: each returns the loss in nats and the share of tokens that are right, or None.
        score: below which a choice tolerates low precision; None: patches do.
    """

    title: str
    model: GPT
    groups: list[Group]
    score: float | None


def vision(title: str, path: str, sizes: dict[str, int]) -> Subject:
    """A vision-language model."""
    loaded = load_trained(path, layout=Layout(RANKS, 1, RANKS), dtype="fp32")
    model, questions = loaded.model, sizes["sequences"]
    assert isinstance(model, VisionLanguageGPT)
    data = DigitQuestions(sizes["groups"] * questions, model.settings.patches, held_out=True)

    def score(group: int) -> tuple[float, float]:
        sampling = {"data_parallel_rank": dist.get_rank(), "data_parallel_size": RANKS}
        part = torch.utils.data.Subset(data, range(group * questions, (group + 1) * questions))
        found = score_answers(model, pretraining_batches(part, micro_batch_size=BATCH, consumed_samples=0, **sampling))
        return found.loss, found.right_tokens

    return Subject(title, model, [partial(score, group) for group in range(sizes["groups"])], None)


def text(name: str, directory: str, sizes: dict[str, int]) -> Subject:
    """A text model; the score below which three quarters of all its choices lie."""
    from benchmarks.quality import sparse_models

    root = Path(directory)
    corpus = sparse_models.corpus_of(root)
    loaded = load_trained(sparse_models.checkpoint_of(root, name), layout=Layout(RANKS, 1, RANKS), dtype="fp32")
    rows = held_out_rows(corpus.prefix, corpus.split, sparse_models.settings()["seq_length"], sizes["text_sequences"])
    scorer = Scorer(loaded.model, BATCH)

    def score(part: Sequence[Any]) -> tuple[float, None]:
        nats = float(scorer.score_all(part)[:, 0].sum())
        return nats / sum(len(row.labels) for row in part), None

    parts = [rows[number :: sizes["groups"]] for number in range(sizes["groups"])]
    groups: list[Group] = [partial(score, part) for part in parts]
    loads = count_loads(loaded.model, groups[0], LowPrecision(score=1.0))
    scores = torch.cat([each for layer in loads for each in layer.scores])
    (bound,) = gather(float(scores.quantile(TOLERANT_SHARE)))[:1]
    return Subject(sparse_models.settings()["models"][name]["title"], loaded.model, groups, bound)


def evaluated(subject: Subject) -> list[dict[str, Any]]:
    """All skews and rows of a model. Collective."""
    model, found = subject.model, []
    layers = [pair.layer for pair in model.scheduled_pairs()]
    gates = [layer.deepspeed_moe.gate.wg.weight for layer in layers]
    before = [weight.detach().clone() for weight in gates]
    tolerance = LowPrecision(score=subject.score)
    for skew in SKEWS:
        with torch.no_grad():
            for weight, value in zip(gates, before, strict=True):
                weight.copy_(value)
        if skew is not None:
            skew_gates(model.scheduled_pairs(), subject.groups[0], first_expert(skew, len(gates[0])))
        rows = []
        for name, settings in row_settings(subject.score).items():
            attached = None if settings is None else use_low_precision(model, settings)
            used = [] if attached is None else attached.layers
            for each in used if name.startswith(COARSE) else []:
                each.format = FourBits()
            results = [group() for group in subject.groups]
            counts = [each.counts for each in used]
            hot = gather([each.hot / each.passes for each in counts])
            rows.append({"row": name, "loss": [loss for loss, _ in results], "hot": hot, "right": _right(results)})
            if attached is not None:
                attached.detach()
        found.append({"skew": skew, "rows": rows, "layers": _loads(count_loads(model, subject.groups[0], tolerance))})
    return found


def _right(results: Sequence[tuple[float, float | None]]) -> float | None:
    known = [right for _, right in results if right is not None]
    return sum(known) / len(known) if known else None


def _loads(loads: Sequence[Loads]) -> list[dict[str, Any]]:
    found = []
    for each in loads:
        busiest = float(each.rows_2E[0].max() / each.rows_2E[0].mean())
        of_ranks = {str(ranks): over_ranks(each, ranks) for ranks in (2, 4)}
        marked, rest = each.rows_2E[1], each.rows_2E[0] - each.rows_2E[1]
        kinds = [float(part.max() / part.mean().clamp(min=1e-9)) for part in (marked, rest)]
        tolerant = float(marked.sum() / each.rows_2E[0].sum())
        one = {"busiest_expert": busiest, "busiest_of_kind": kinds, "tolerant": tolerant, "ranks": of_ranks}
        found.append(one)
    return found


def on_ranks(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """All models, one after the other, on this rank."""
    torch.set_num_threads(1)
    names = settings["text_models"]
    subjects = [partial(vision, title, path, settings) for title, path in settings["vision"].items()]
    subjects += [partial(text, name, settings["text"], settings) for name in names]
    found = []
    for make in subjects:
        subject = make()
        found.append({"title": subject.title, "score": subject.score, "skews": evaluated(subject)})
    return found


def trained_vision(directory: Path) -> dict[str, str]:
    """Title to checkpoints of the vision-language models, which are trained if they are not there."""
    example, found = ROOT / "examples/vision_language.py", {}
    for name, title in VISION.items():
        whole, place = json.loads(example.with_suffix(".json").read_text(encoding="utf-8")), directory / name
        if name != "balanced":
            whole["scmoe"] |= {"aux_loss_coefficient": 0.0, "drop_tokens": False}
        if not place.is_dir():
            config = directory / f"{name}.json"
            directory.mkdir(parents=True, exist_ok=True)
            config.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
            command = [sys.executable, str(example), "--save", str(place), "--deepspeed_config", str(config)]
            environ = {**environment_of_one(), "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
            subprocess.run(command, env=environ, check=True)
        found[title] = str(place)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="directory of the page and the record")
    parser.add_argument("--vision", type=Path, default=Path("data/low_precision"), help="of vision-language models")
    parser.add_argument("--text", type=Path, help="--output of benchmarks.quality.sparse_models")
    parser.add_argument("--text-models", nargs="+", default=[], help="of these: scmoe2 top2 scmoe1")
    parser.add_argument("--groups", type=int, default=6, help="of held-out sequences; the spread is over them")
    parser.add_argument("--sequences", type=int, default=128, help="questions of a group")
    parser.add_argument("--text-sequences", type=int, default=256, help="of all groups together")
    args = parser.parse_args(argv)
    if bool(args.text_models) != bool(args.text):
        parser.error("--text and --text-models go together")
    sizes = {"groups": args.groups, "sequences": args.sequences, "text_sequences": args.text_sequences}
    settings = {**sizes, "vision": trained_vision(args.vision.resolve()), "text_models": args.text_models}
    settings["text"] = str(args.text.resolve()) if args.text else ""
    os.environ.update(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1")
    models = run_distributed(on_ranks, RANKS, settings, timeout_s=3000)[0]
    given = " ".join(argv if argv is not None else sys.argv[1:])
    command = f"python -m benchmarks.quality.low_precision {given}".strip()
    record = {"command": command, "environment": environment(), **sizes, "models": models}
    text = markdown(record)
    print(text)
    if args.output:
        (args.output / "low_precision_quality.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        (args.output / "low_precision_quality.md").write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

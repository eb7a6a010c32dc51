"""The paper's analyses (figures 9, 10, appendix A.1) of four models trained side by side on installed text.

    python -m benchmarks.quality.analyses --output-dir benchmarks/results

Top-2, shared expert, DGMoE and ScMoE are trained as benchmarks.quality.compare does it (its corpus, sizes and
optimizer; fewer iterations, more checkpoints), then scmoe analyze reads held-out text with them. For the feasibility
page, the operators of ScMoE are timed on two CPU processes or on all GPUs. Training goes on where it was stopped. Each
figure can be made again from its record: `scmoe analyze KIND --from-json FILE`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.quality.crew import ROOT, locked
from benchmarks.quality.record import Plan, QualityError, load_plan
from benchmarks.quality.text_corpus import Corpus, CorpusSettings, describe, prepare_corpus
from scmoe_ds.errors import DataError
from scmoe_ds.parallel.agreement import fingerprint

RUNS = {"top2": "top-2", "shared_expert": "shared expert", "dgmoe": "DGMoE Pos-2", "scmoe": "ScMoE Pos-2 CG-1"}
"""Directory of a run to its variant in benchmarks/quality/quality.json."""
SEED = 1
SIMILARITY_TOKENS, GATING_TOKENS, MICRO_BATCHES = 100_000, 32_768, 32


def train(plan: Plan, corpus: Corpus, directory: Path, iterations: int, interval: int) -> None:
    """All runs, or what is left of them.

    Raises:
        subprocess.CalledProcessError: one failed; it has said why.
    """
    for name, variant in RUNS.items():
        run = directory / name
        run.mkdir(parents=True, exist_ok=True)
        config = run / "deepspeed.json"
        config.write_text(json.dumps(plan.deepspeed(variant), indent=1) + "\n", encoding="utf-8")
        _call(
            plan,
            "pretrain_gpt_scmoe.py",
            *plan.model_flags(variant),
            "--deepspeed_config",
            str(config),
            "--data-path",
            corpus.prefix,
            "--split",
            corpus.split,
            *corpus.tokenizer_flags,
            "--seed",
            str(SEED),
            "--train-iters",
            str(iterations),
            "--save",
            str(run),
            "--save-interval",
            str(interval),
            "--auto-resume",
        )


def analyse(plan: Plan, corpus: Corpus, directory: Path, output: Path) -> None:
    """Writes every record, and its figure.

    Raises:
        subprocess.CalledProcessError: one failed; it has said why.
    """
    held_out = ["--data-path", corpus.prefix, "--split", corpus.split]
    batch = ["--batch-size", str(plan.preset["deepspeed"]["train_micro_batch_size_per_gpu"])]
    for name in ("top2", "scmoe"):
        _call(
            plan,
            "-m",
            "scmoe_ds.programs.analyze",
            "similarity",
            "--load",
            str(directory / name),
            *held_out,
            "--max-tokens",
            str(SIMILARITY_TOKENS),
            "--output",
            str(output / f"analysis_similarity_{name}.json"),
        )
    for name in ("dgmoe", "scmoe"):
        _call(
            plan,
            "-m",
            "scmoe_ds.programs.analyze",
            "gating",
            "--load",
            str(directory / name),
            "--all-checkpoints",
            *held_out,
            *batch,
            "--max-tokens",
            str(GATING_TOKENS),
            "--output",
            str(output / f"analysis_gating_{name}.json"),
        )
    loads = [flag for name in RUNS for flag in ("--load", str(directory / name))]
    _call(
        plan,
        "-m",
        "scmoe_ds.programs.analyze",
        "gradients",
        *loads,
        "--all-checkpoints",
        *held_out,
        *batch,
        "--dtype",
        "fp32",
        "--micro-batches",
        str(MICRO_BATCHES),
        "--output",
        str(output / "analysis_gradients.json"),
    )


def judge(plan: Plan, directory: Path, output: Path) -> None:
    """Times ScMoE's operators on this machine, and writes the feasibility page of the top-2 model.

    Raises:
        subprocess.CalledProcessError: one failed; it has said why.
    """
    on_cpu = plan.preset["environment"].get("DS_ACCELERATOR") == "cpu"
    ranks = 2 if on_cpu else torch.cuda.device_count()
    if ranks < 2:
        print(f"{ranks} GPU(s): nothing travels between ranks, there is no feasibility page to write", flush=True)
        return
    times, fresh, config = output / "analysis_times.json", directory / "times.json", directory / "deepspeed.json"
    fresh.unlink(missing_ok=True)  # otherwise it would be read instead of measured
    section = {
        **plan.sections[RUNS["scmoe"]],
        "expert_parallel_size": ranks,
        "overlap": {"calibration_file": str(fresh)},
    }
    config.write_text(json.dumps({**plan.preset["deepspeed"], "scmoe": section}, indent=1) + "\n", encoding="utf-8")
    launcher = str(Path(sys.executable).with_name("deepspeed"))
    _call(
        plan,
        launcher,
        "--num_accelerators" if on_cpu else "--num_gpus",
        str(ranks),
        "--module",
        "scmoe_ds.programs.report",
        "--deepspeed_config",
        str(config),
        *plan.model_flags(),
    )
    shutil.copy(fresh, times)
    _call(
        plan,
        "-m",
        "scmoe_ds.programs.analyze",
        "feasibility",
        "--similarity",
        str(output / "analysis_similarity_top2.json"),
        "--calibration",
        str(times),
        "--output-prefix",
        str(output / "analysis_feasibility"),
    )


def _call(plan: Plan, *command: str) -> None:
    environ = {**os.environ, **plan.preset["environment"]}
    subprocess.run([sys.executable, *command], cwd=ROOT, env=environ, check=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="cpu", help="sizes in benchmarks/quality/quality.json")
    parser.add_argument("--output-dir", type=Path, required=True, help="of records and figures")
    parser.add_argument("--work-dir", type=Path, default=Path("data/quality"), help="of corpus and checkpoints")
    parser.add_argument("--train-iters", type=int, default=300, help="iterations of each run")
    parser.add_argument("--save-interval", type=int, default=50, help="iterations between the checkpoints")
    args = parser.parse_args(argv)
    try:
        plan = load_plan(ROOT / "benchmarks" / "quality" / "quality.json", args.preset)
        work, output = (_from_root(path) for path in (args.work_dir / args.preset, args.output_dir))
        output.mkdir(parents=True, exist_ok=True)
        os.chdir(ROOT)
        with locked(work):
            corpus = prepare_corpus(work / "corpus", CorpusSettings(**plan.preset["corpus"]))
            print(describe(corpus.record), flush=True)
            sizes = [plan.identity(corpus.record), plan.sections, args.train_iters]
            directory = work / f"analyses_{fingerprint(sizes)}"  # checkpoints of other sizes must not be resumed
            train(plan, corpus, directory, args.train_iters, args.save_interval)
            analyse(plan, corpus, directory, output)
            judge(plan, directory, output)
    except (QualityError, DataError) as error:
        print(f"benchmarks.quality.analyses: error: {error}", file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:
        program = error.cmd[2] if error.cmd[1] == "-m" else error.cmd[1]
        print(f"benchmarks.quality.analyses: {program} ended with exit code {error.returncode}", file=sys.stderr)
        return 1
    return 0


def _from_root(path: Path) -> Path:
    """The same place as a path from the repository: so it stands in the records."""
    return Path(os.path.relpath(path.resolve(), ROOT))


if __name__ == "__main__":
    sys.exit(main())

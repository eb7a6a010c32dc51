"""What it costs to make a trained MoE model a ScMoE: loss after surgery, after self-distillation and fine-tuning.

    python -m benchmarks.quality.adapt --output benchmarks/results/adapt_cpu --parallel 2 --budget-minutes 60
    python -m benchmarks.quality.adapt --from-json benchmarks/results/adapt_cpu.json

Teachers are a Qwen3-MoE (transformers' class, trained under DeepSpeed's AutoEP) and this package's top-2 GPT. Their
students are trained on a tenth of the teacher's tokens, all of one seed on the same batches: by self-distillation, by
fine-tuning, and, to compare with, the teacher itself is trained on. Sizes, runs and their order are in
benchmarks/quality/adapt.json. Runs go by importance, each line of that order with all seeds; those that have ended are
in the record, and the same command goes on. Teachers stay in --work-dir.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.quality.adapt_figure import figure
from benchmarks.quality.adapt_gpt import StudentTask
from benchmarks.quality.adapt_hf import HFTask, deepspeed_json
from benchmarks.quality.adapt_plan import AdaptPlan, Run, load_plan, teacher_name
from benchmarks.quality.adapt_table import markdown
from benchmarks.quality.compare import Benchmark, run
from benchmarks.quality.crew import Crew
from benchmarks.quality.entropy import entropies
from benchmarks.quality.run import Task

_SAVES = 8  # checkpoints of a run that is not evaluated on the way
_OTHER_ORDER = 1000  # students read the documents in the order of the seed that is so much larger


class AdaptCrew(Crew):
    """Teachers, and students that wait for theirs."""

    plan: AdaptPlan  # type: ignore[assignment]

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.record.content.setdefault("entropies", entropies(self.corpus))

    def work(self, unfinished: Sequence[tuple[str, int]]) -> None:
        self._awaited = {pair for pair in unfinished if self.plan.runs[pair[0]].is_teacher}
        super().work(unfinished)

    def _run(self, variant: str, seed: int) -> dict[str, Any] | None:
        run = self.plan.runs[variant]
        if run.is_teacher:
            try:
                return super()._run(variant, seed)
            finally:
                self._awaited.discard((variant, seed))
        teacher = (teacher_name(run.teacher), seed)
        while teacher in self._awaited and not self.stopping.is_set():
            time.sleep(1)
        if not run.recipe.get("scratch") and not (self.place(*teacher) / "result.json").is_file():
            print(f"{variant}, seed {seed}: its teacher is not trained", flush=True)
            return None
        return super()._run(variant, seed)

    def _found(self, directory: Path) -> dict[str, Any]:
        if (directory / "checkpoints" / "log.jsonl").is_file():
            return super()._found(directory)
        return dict(json.loads((directory / "result.json").read_text(encoding="utf-8")))

    def _clear(self, variant: str, directory: Path) -> None:
        if not self.plan.runs[variant].is_teacher:
            super()._clear(variant, directory)

    def _task(self, variant: str, seed: int, directory: Path) -> Any:
        run = self.plan.runs[variant]
        return self._hugging_face(run, seed, directory) if run.is_hugging_face else self._gpt(run, seed, directory)

    def _hugging_face(self, run: Run, seed: int, directory: Path) -> HFTask:
        preset, sizes = self.plan.preset, self.plan.preset["evaluation"]
        source = None if run.is_teacher else str(self.place(teacher_name(run.teacher), seed) / "model")
        return HFTask(
            str(directory),
            str(self.corpus.directory),
            preset["teachers"][run.teacher]["model"] if run.is_teacher else None,
            source,
            seed if run.is_teacher else seed + _OTHER_ORDER,
            self.plan.section(run),
            **self.plan.schedule(run),
            batch_size=preset["batch_size"],
            seq_length=preset["seq_length"],
            sequences=sizes["sequences" if run.is_teacher else "sequences_of_students"],
            **self._student(run),
        )

    def _student(self, run: Run) -> dict[str, Any]:
        """What the tasks of both kinds say of a student."""
        if run.is_teacher:
            return {}
        conversion, sizes = run.conversion or {}, self.plan.preset["evaluation"]
        moe_layers = self.plan.preset["teachers"][run.teacher]["moe_layers"]
        layers = moe_layers // 2 if conversion.get("half") else moe_layers - conversion.get("all_but", 0)
        ordered = layers < moe_layers or "convert_over" in run.recipe
        return {
            "order_at": conversion["position"] if ordered else None,
            "layers": layers if layers < moe_layers else 0,
            "on_the_way": [step for step in self.plan.preset["students"]["on_the_way"] if step < run.steps],
            "sequences_on_the_way": sizes["sequences_on_the_way"],
        }

    def _gpt(self, run: Run, seed: int, directory: Path) -> Task | StudentTask:
        preset, sizes, schedule = self.plan.preset, self.plan.preset["evaluation"], self.plan.schedule(run)
        student = self._student(run)
        on_the_way = student.get("on_the_way")
        # Students are evaluated on the way from their checkpoints.
        interval = math.gcd(run.steps, *on_the_way) if on_the_way else run.steps // _SAVES
        flags = preset["teachers"][run.teacher]["flags"] | {
            "seq-length": preset["seq_length"],
            "train-iters": run.steps,
            "save-interval": interval,
            "seed": seed if run.is_teacher else seed + _OTHER_ORDER,
            "data-path": self.corpus.prefix,
            "split": self.corpus.split,
            "data-cache-path": directory / "cache",
            "save": directory / "checkpoints",
            "keep-last": 1 if run.is_teacher else run.steps // interval,
        }
        words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        words += [*self.corpus.tokenizer_flags, "--auto-resume"]
        config: dict[str, Any] = {**deepspeed_json(preset["batch_size"], **schedule), "scmoe": self.plan.section(run)}
        result = str(directory / "result.json")
        if run.is_teacher or run.recipe.get("scratch"):
            path = directory / "deepspeed.json"
            path.write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
            words += ["--deepspeed_config", str(path)]
            sequences = sizes["sequences" if run.is_teacher else "sequences_of_students"]
            return Task(words, sequences, sizes["batch_size"], 0, result)
        source = str(self.place(teacher_name(run.teacher), seed) / "checkpoints")
        if "adapt" in config["scmoe"]:
            config["scmoe"]["adapt"]["source"] = source
        return StudentTask(
            words, source, config, sizes["sequences_of_students"], sizes["batch_size"], result, **student
        )


def main(argv: Sequence[str] | None = None) -> int:
    settings = Path(__file__).with_suffix(".json")
    name = "benchmarks.quality.adapt"
    return run(Benchmark(name, __doc__, settings, markdown, figure, load_plan, AdaptCrew), argv)


if __name__ == "__main__":
    sys.exit(main())

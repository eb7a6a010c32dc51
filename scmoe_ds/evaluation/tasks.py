"""Runs benchmarks of EleutherAI's lm_eval, from local files only."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from scmoe_ds.data.tokenizer import Tokenizer
from scmoe_ds.errors import ArgumentError, EvaluationError, imports_of
from scmoe_ds.evaluation.scoring import Scorer
from scmoe_ds.evaluation.windows import SlidingWindow
from scmoe_ds.parallel.agreement import is_rank_zero, run_together

_BOOTSTRAP_SAMPLES = 1000


@dataclass(frozen=True)
class TaskResults:
    """The results of lm_eval.

    Attributes:
        table: as text.
        record: "results" (and "groups") by task, "n-shot" and "n-samples"; "truncated": requests that were longer than
            the model's context.
    """

    table: str
    record: dict[str, Any]


def prepare() -> None:
    """Keeps lm_eval and its imports off the network. Call it before anything imports `huggingface_hub`. Raises a
    MissingPackageError if lm_eval is not installed."""
    os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
    # Otherwise each rank would fork a process per core for the standard errors.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    with imports_of("eval", "--tasks"):
        from lm_eval.tasks import TaskManager
    if not hasattr(TaskManager, "load"):
        raise ArgumentError('--tasks: the installed lm_eval is older than 0.4.13; pip install "scmoe_ds[eval]"')


def evaluate_tasks(
    scorer: Scorer,
    tokenizer: Tokenizer,
    rule: SlidingWindow,
    names: Sequence[str],
    include_path: str | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
) -> TaskResults | None:
    """Runs tasks. Returns None on all ranks but the first of each machine. Collective over the world.

    Args:
        names: of tasks, groups or tags.
        include_path: directory of more tasks, which override lm_eval's tasks of the same name.
        num_fewshot: examples before each question; None leaves it to the task.
        limit: questions of each task; None asks all.

    Raises:
        ArgumentError, EvaluationError: a task is unknown, or its data cannot be read.
    """
    import lm_eval
    from lm_eval.utils import make_table

    from scmoe_ds.evaluation.harness import ScMoELM

    manager, tasks = run_together(lambda: _load(names, include_path))
    model = ScMoELM(scorer, tokenizer, rule)
    found = lm_eval.simple_evaluate(
        model=model,
        tasks=tasks,
        task_manager=manager,
        num_fewshot=num_fewshot,
        limit=limit,
        log_samples=False,
        bootstrap_iters=_BOOTSTRAP_SAMPLES if is_rank_zero() else 0,
    )
    if found is None:
        return None
    columns = [column for column in ("results", "groups") if found.get(column)]
    table = "\n".join(make_table(found, column) for column in columns)
    record = {key: found[key] for key in (*columns, "n-shot", "n-samples", "versions") if key in found}
    return TaskResults(table, {**record, "truncated": model.truncated})


def _load(names: Sequence[str], include_path: str | None) -> tuple[Any, list[Any]]:
    from lm_eval.tasks import TaskManager

    # To list its tasks, lm_eval reads thousands of files, which takes longer than a small task.
    manager = TaskManager(include_path=include_path, include_defaults=False) if include_path else None
    if manager is None or set(names) - set(manager.all_tasks):
        own = manager.all_tasks if manager else []
        manager = TaskManager(include_path=include_path)
        unknown = sorted(set(names) - set(manager.all_tasks))
        if unknown:
            where = "give --include-path for tasks of your own"
            if include_path:
                where = f"--include-path {include_path} has {', '.join(own) or 'none'}"
            raise ArgumentError(f"--tasks {','.join(unknown)}: neither a task of lm_eval nor of yours; {where}")
    tasks = []
    for name in names:
        try:
            loaded = manager.load([name])
        except Exception as error:  # data sets, YAML, Jinja and the tasks' own code raise anything
            said = " ".join(f"{error} {error.__cause__ or ''}".split())
            raise EvaluationError(
                f"--tasks {name}: its definition or data cannot be read from local files ({type(error).__name__}: "
                f"{said[:300]}): nothing is downloaded; name your files as dataset_kwargs.data_files in a task of "
                "--include-path"
            ) from None
        group = loaded.get("groups", {}).get(name)
        tasks += [group] if group is not None else list(loaded["tasks"].values())
    return manager, tasks

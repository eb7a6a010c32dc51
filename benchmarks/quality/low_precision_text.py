"""What low precision on overloaded ranks costs a trained model: the loss of a text, by the bound of the gate's score.

    python -m benchmarks.quality.low_precision_text --load checkpoints/scmoe2 --data-path text_corpus \\
        --split 2021,69,0 --output benchmarks/results

The ranks are processes of this machine. A batch holds windows that follow each other in the text, so that one subject
fills it and its experts are busier than others. Losses are of the same windows in every row.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.harness import tables
from benchmarks.harness.measure import environment, environment_text
from benchmarks.harness.on_nodes import write
from lab.distributed import run_distributed
from scmoe_ds.evaluation.documents import open_documents
from scmoe_ds.evaluation.scoring import Scorer
from scmoe_ds.evaluation.windows import Row, SlidingWindow, row_of
from scmoe_ds.inference.load import Loaded, load_trained
from scmoe_ds.inference.low_precision import use_low_precision
from scmoe_ds.moe.decisions.low_precision import LowPrecision, LowPrecisionExperts
from scmoe_ds.parallel.agreement import gather
from scmoe_ds.parallel.groups import Layout


def settings_of_rows(scores: Sequence[float], shares: Sequence[float]) -> dict[str, LowPrecision | None]:
    """The rows of the table; the first is what the others are compared with."""
    rows: dict[str, LowPrecision | None] = {"off": None}
    for score in scores:
        for share in shares:
            rows[f"hot, score below {score:g}, share {share:g}"] = LowPrecision("hot", score, share)
    return {**rows, "hot, every row tolerant": LowPrecision("hot", 1.0, 0.0), "all": LowPrecision("all", 1.0)}


class Watched:
    """The rows of each pass on this rank, told where they are decided on."""

    def __init__(self) -> None:
        self.loads: list[float] = []
        self.tolerant: list[float] = []
        decide = LowPrecisionExperts._decide

        def watching(experts: LowPrecisionExperts, tokens: int, rows: int, own: int, tolerant: int) -> bool:
            self.loads.append(own * experts.slices.expert_parallel_size / rows)
            if own * experts.slices.expert_parallel_size > experts.settings.overload * rows:
                self.tolerant.append(tolerant / own)
            return decide(experts, tokens, rows, own, tolerant)

        LowPrecisionExperts._decide = watching  # type: ignore[method-assign]


def rank_main(args: dict[str, Any]) -> list[dict[str, Any]]:
    """On every rank: the rows of the table. Collective."""
    torch.set_num_threads(1)
    ranks = dist.get_world_size()
    loaded = load_trained(args["load"], layout=Layout(ranks, 1, ranks))
    scorer = Scorer(loaded.model, args["batch_size"], loaded.tokenizer.vocab_size)
    windows = _windows(loaded, args)
    found = []
    watched = Watched()
    for name, settings in settings_of_rows(args["scores"], args["shares"]).items():
        watched.loads, watched.tolerant = [], []
        attached = None if settings is None else use_low_precision(loaded.model, settings)
        nats = float(scorer.score_all(windows)[:, 0].sum())
        row: dict[str, Any] = {"row": name, "loss": nats / sum(len(window.labels) for window in windows)}
        if attached is not None:
            counts = [each.counts for each in attached.layers]
            hot, passes = sum(each.hot for each in counts), sum(each.passes for each in counts)
            row["hot_share"] = sum(gather(hot)) / (ranks * passes)
            row["busiest_rank"] = statistics.mean(map(max, zip(*gather(watched.loads), strict=True)))
            tolerant = [share for shares in gather(watched.tolerant) for share in shares]
            row["tolerant_share"] = statistics.median(tolerant) if tolerant else None
            attached.detach()
        found.append(row)
    return found


def _windows(loaded: Loaded, args: dict[str, Any]) -> list[Row]:
    documents = open_documents(args["data_path"], args["split"], None, loaded.tokenizer)
    length = loaded.trained.settings.max_position_embeddings
    rule = SlidingWindow(length, length)
    every = (
        row_of(documents.tokens(document), window, loaded.tokenizer.eod)
        for document, tokens in enumerate(documents.lengths)
        for window in rule.windows(int(tokens))
        if window.stop - window.begin == length
    )
    return list(islice(every, args["windows"]))


def markdown(record: dict[str, Any]) -> str:
    """The record as a table."""
    settings, first = record["settings"], record["rows"][0]
    cells = []
    for row in record["rows"]:
        change = f"{100 * (row['loss'] / first['loss'] - 1):+.3f} %"
        told = ["", "", ""]
        if "hot_share" in row:
            tolerant = row["tolerant_share"]
            shown = "–" if tolerant is None else f"{tolerant:.2f}"
            told = [f"{100 * row['hot_share']:.0f} %", shown, f"{row['busiest_rank']:.2f}"]
        cells.append([row["row"], f"{row['loss']:.5f}", change, *told])
    header = ["row", "loss", "change", "hot passes", "tolerant rows of overloaded ranks", "busiest rank / mean"]
    return "\n".join(
        [
            "# Low precision on overloaded ranks: loss of a trained model",
            "",
            f"`{record['command']}`",
            "",
            f"{environment_text(record['environment'])}. {record['model']}, {settings['ranks']} ranks, "
            f"{settings['windows']} windows of the validation text, {settings['batch_size']} a rank and batch, int8. "
            "Hot passes: share of a rank's layer passes. Tolerant rows: the median share. Busiest rank: mean over "
            "passes.",
            "",
            *tables.table(header, cells),
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load", required=True, help="a checkpoint or export of a GPT")
    parser.add_argument("--data-path", required=True, help="prefix of a .bin and .idx")
    parser.add_argument("--split", required=True, help="of the pretraining")
    parser.add_argument("--ranks", type=int, default=4, help="expert-parallel ones")
    parser.add_argument("--windows", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=16, help="windows that a rank reads together")
    parser.add_argument("--scores", type=float, nargs="+", default=[0.55, 0.6, 0.7, 0.8], help="bounds of the gate's")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.7], help="M_d")
    parser.add_argument("--output", type=Path, help="directory for JSON and table")
    args = parser.parse_args()
    settings = {key: value for key, value in vars(args).items() if key != "output"}
    rows = run_distributed(rank_main, args.ranks, settings, timeout_s=3600)[0]
    command = "python -m benchmarks.quality.low_precision_text --load … --data-path … --split …"
    model = f"{Path(args.load).parent.name}, a ScMoE trained here"
    kept = {key: value for key, value in settings.items() if key not in ("load", "data_path")}
    record = {"command": command, "environment": environment(), "settings": kept, "model": model, "rows": rows}
    text = markdown(record)
    print(text)
    if args.output:
        write(args.output, "low_precision_text", json.loads(json.dumps(record)), text)


if __name__ == "__main__":
    main()

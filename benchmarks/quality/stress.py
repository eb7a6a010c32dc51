"""Does a shortcut stand changes of the Transformer around it? Similarity and loss under each, ScMoE against top-2.

    python -m benchmarks.quality.stress --output benchmarks/results/stress_cpu --parallel 2 --seeds 1 2 3
    python -m benchmarks.quality.stress --from-json benchmarks/results/stress_cpu.json

Norm placement, residual scale, depth, heads, and how often there is an MoE; all in benchmarks/quality/stress.json.
Runs, seeds and record are those of benchmarks.quality.compare. Of each trained model the record also has the similarity
of all its representations. For the frequencies of MoE layers, the table has what the planner predicts from the operator
times that benchmarks.speed.block has measured on two nodes (its committed records), side by side with the losses.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.quality.compare import Benchmark, run
from benchmarks.quality.stress_table import figure, markdown


def main(argv: Sequence[str] | None = None) -> int:
    return run(
        Benchmark("benchmarks.quality.stress", __doc__, Path(__file__).with_suffix(".json"), markdown, figure), argv
    )


if __name__ == "__main__":
    sys.exit(main())

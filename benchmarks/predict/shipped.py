"""What ScMoE would gain on the shipped clusters: the table of the README. All of it is simulated.

python -m benchmarks.predict.shipped            # prints it
python -m benchmarks.predict.shipped README.md  # writes it into the page

GPT2-MoE-Medium, 128 sequences of 2048 tokens per node and step in bf16, ZeRO-1, one expert group over all GPUs, at most
16, and the largest micro-batch up to 8 that fits with every method. The layout is not searched: `scmoe plan` does that.
"""

from __future__ import annotations

import sys
from pathlib import Path

from scmoe_ds.programs.plan_model import model_of_preset
from scmoe_ds.simulate.cluster import Cluster, read_cluster
from scmoe_ds.simulate.layout import Layout
from scmoe_ds.simulate.memory import memory_of
from scmoe_ds.simulate.method import DEEPSPEED_TOPK, PIPELINED, SCMOE, SHARED, Method
from scmoe_ds.simulate.model import Model
from scmoe_ds.simulate.routing import Routing
from scmoe_ds.simulate.rows import Interval, Row, machines, rows
from scmoe_ds.simulate.search import run

PRESET = "gpt2-moe-medium"
BEGIN, END = "<!-- python -m benchmarks.predict.shipped README.md -->", "<!-- end -->"
_CLUSTERS = Path(__file__).parents[2] / "clusters"
_COMPARED = (DEEPSPEED_TOPK, PIPELINED, SHARED, SCMOE[1])
_PER_NODE = 128


def shipped() -> list[Path]:
    """Descriptions of GPUs."""
    return [path for path in sorted(_CLUSTERS.glob("*x*.json")) if not path.name.startswith(("lab_", "4x8"))]


def table() -> str:
    """In Markdown."""
    head = (
        "| cluster, simulated | waits with DeepSpeed's top-2 | ScMoE Pos-2 over it | over top-2, pipelined | over a "
        "shared expert | MFU of ScMoE |\n|---|---|---|---|---|---|"
    )
    return "\n".join([head, *map(_line, shipped())])


def _line(path: Path) -> str:
    cluster = read_cluster(path)
    top_2, pipelined, shared, scmoe = simulated(cluster)
    gains = [_gain(scmoe, other) for other in (top_2, pipelined, shared)]
    waits, mfu = (f"{100 * value:.0f} %" for value in (top_2.exposed_share.likely, scmoe.mfu.likely))
    return f"| [{path.stem}](clusters/{path.name}) | {waits} | {' | '.join(gains)} | {mfu} |"


def _gain(row: Row, other: Row) -> str:
    gain = Interval.of([theirs / own for own, theirs in zip(row.steps_ms, other.steps_ms, strict=True)])
    return f"{gain.likely:.2f} ({gain.low:.2f}–{gain.high:.2f})"


def simulated(cluster: Cluster) -> list[Row]:
    """The compared methods."""
    model, (likely, *corners) = model_of_preset(PRESET), machines(cluster, None)
    runs = [run(model, method, layout_of(model, method, cluster), likely, Routing()) for method in _COMPARED]
    return rows(model, runs, corners, Routing(), 1e9)


def layout_of(model: Model, method: Method, cluster: Cluster) -> Layout:
    """The same for all methods."""
    world = cluster.nodes * cluster.gpus_per_node
    samples = _PER_NODE * cluster.nodes // world
    for micro in (8, 4, 2, 1):
        layout = Layout(
            world,
            expert_parallel=min(world, 16),
            micro_batch=micro,
            accumulation=samples // micro,
            copies="choice" if method.layer == "deepspeed" else "rank",
        )
        if all(memory_of(model, each, layout).total <= cluster.gpu.memory for each in _COMPARED):
            break
    return layout


def in_page(text: str) -> str:
    """The page with the table between its marks."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{rest.split(END)[1]}"


def main() -> None:
    """Prints the table, or writes it into a page."""
    if len(sys.argv) == 1:
        print(table())
        return
    page = Path(sys.argv[1])
    page.write_text(in_page(page.read_text("utf-8")), "utf-8")


if __name__ == "__main__":
    main()

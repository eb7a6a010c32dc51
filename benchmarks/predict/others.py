"""Speed-ups that others published, beside the range that the simulation gives over the settings they do not state.

    python -m benchmarks.predict.others --output benchmarks/results

Nobody of them states all that a simulation needs. What is unknown is varied; the range of the results stands beside the
published number. Where a method is not one that is simulated, the range is of its limit: the same step without any
exposed all-to-all. A published number beyond its limit would contradict the simulation.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.harness.measure import environment, environment_text
from benchmarks.harness.tables import table
from benchmarks.predict.chain import CLUSTERS, times_of
from scmoe_ds.analysis.markdown import code
from scmoe_ds.programs.plan_model import model_of_preset
from scmoe_ds.simulate.cluster import Cluster, read_cluster
from scmoe_ds.simulate.collectives import all_to_all_ms
from scmoe_ds.simulate.hugging_face import model_of_config
from scmoe_ds.simulate.layout import Layout
from scmoe_ds.simulate.machine import machine_of
from scmoe_ds.simulate.method import AUTOEP, Method
from scmoe_ds.simulate.model import Model
from scmoe_ds.simulate.places import places_of
from scmoe_ds.simulate.routing import Routing
from scmoe_ds.simulate.step import Step, run_step
from scmoe_ds.simulate.work import Exchange

Ratios = Iterator[tuple[str, float]]
"""What was assumed for the unknown, and the speed-up."""
DEEPSEEK_16B = {
    "model_type": "deepseek_v3",
    "num_hidden_layers": 27,
    "hidden_size": 2048,
    "intermediate_size": 11264,
    "moe_intermediate_size": 1408,
    "n_routed_experts": 64,
    "num_experts_per_tok": 6,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "vocab_size": 102400,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
"""Sizes of DeepSeek's 16B models, as their config.json gives them."""
FAIR = Routing()
PLAIN = Method("top-k", "topk", overlap=False)
SCMOE_1 = Method("ScMoE Pos-1", "scmoe", position="pos1", most_chunks=4)


@dataclass(frozen=True)
class Claim:
    """A published number.

    Attributes:
        source, what: where it stands, and of what.
        published: lowest and highest speed-up.
        is_limit: whether `ratios` gives the most that any such method could reach.
        unknown: settings that are varied, or that nothing is known of.
        note: on a disagreement.
        ratios: simulated.
    """

    source: str
    what: str
    published: tuple[float, float]
    is_limit: bool
    unknown: str
    ratios: Callable[[], Ratios]
    note: str = ""


def cluster_of(name: str, nodes: int) -> Cluster:
    """Some nodes of a described cluster."""
    return read_cluster(CLUSTERS / f"{name}.json").model_copy(update={"nodes": nodes})


@functools.cache
def deepseek_16b() -> Model:
    """DeepSeek-V3-16B of torchtitan, and the size of Megatron's examples."""
    return model_of_config(DEEPSEEK_16B, "DeepSeek-V3-16B")


def step_of(
    model: Model,
    method: Method,
    cluster: Cluster,
    expert_parallel: int,
    micro_batch: int,
    once: bool = False,
    routing: Routing = FAIR,
) -> Step:
    """A step of one micro-batch with ZeRO-1, of a cluster's GPUs.

    Args:
        once: whether a row travels once to a node and once to a rank, as DeepEP does it, and not once per expert.
    """
    world = cluster.nodes * cluster.gpus_per_node
    layout = Layout(
        world,
        expert_parallel=expert_parallel,
        micro_batch=micro_batch,
        copies="rank" if once else "choice",
        hierarchical=once,
    )
    return run_step(times_of(model, method, layout, machine_of(cluster), routing), layout)


def limits(
    model: Model, name: str, gpus: int, experts: Sequence[int], method: Method = AUTOEP, routing: Routing = FAIR
) -> Ratios:
    """Of any method that hides the all-to-all: the step over the step without what is exposed of it."""
    cluster = cluster_of(name, gpus // 8)
    for expert_parallel, micro_batch in itertools.product(experts, (1, 4)):
        step = step_of(model, method, cluster, expert_parallel, micro_batch, routing=routing)
        words = f"{model.name}, EP {expert_parallel}, micro-batch {micro_batch}"
        yield words, step.total_ms / (step.total_ms - step.exposed_ms)


def shortcuts() -> Ratios:
    """ScMoE with an MoE in every block, over a blocking all-to-all."""
    for nodes, micro_batch, once in itertools.product((2, 8), (1, 4), (False, True)):
        cluster = cluster_of("8x8xH100-8x400g", nodes)
        before, after = (
            step_of(deepseek_16b(), method, cluster, 8 * nodes, micro_batch, once) for method in (PLAIN, SCMOE_1)
        )
        how = "a row once per rank and node" if once else "a row per choice"
        yield f"EP {8 * nodes}, micro-batch {micro_batch}, {how}", before.total_ms / after.total_ms


def net_moe() -> Ratios:
    """Two of the paper's models with as many experts as GPUs."""
    for preset, skew in itertools.product(("gpt2-moe-medium", "gpt3-moe-xl"), (1.0, 2.0)):
        model = model_of_preset(preset, {"num_experts": 32})
        for words, ratio in limits(model, "4x8xA800-4x200g", 32, (32,), PLAIN, Routing(skew=skew)):
            yield f"{words}, busiest rank {skew:g} × the mean", ratio


def copies(skew: float) -> Ratios:
    """One copy of a row per rank over one per choice: the all-to-all alone."""
    for name, nodes in (("8xH100-nvlink", 1), ("8x8xH100-8x400g", 2)):
        cluster = cluster_of(name, nodes)
        for experts, choices in ((8, 2), (64, 6), (128, 8)):
            ranks = min(8 * nodes, experts)
            layout = Layout(8 * nodes, expert_parallel=ranks)
            exchange = Exchange(8192.0 * choices, choices, 4096.0, padded=False)
            places = places_of("ep", layout, 8)
            loads = Routing(skew=skew).loads(exchange.rows, places.ranks, places.per_node, experts)
            per_choice, per_rank = (
                all_to_all_ms(exchange, replace(layout, copies=each), machine_of(cluster), experts, loads)[0]
                for each in ("choice", "rank")
            )
            yield f"{ranks} ranks, {choices} of {experts} experts", per_choice / per_rank


CLAIMS = (
    Claim(
        "DeepSpeed#8213",
        "one copy of a row per rank",
        (1.29, 1.29),
        False,
        "model, choices, ranks, what was timed; here the all-to-all alone",
        lambda: copies(1.0),
    ),
    Claim(
        "DeepSpeed#8213",
        "the same, busiest rank 5 × the mean",
        (2.49, 2.49),
        False,
        "as above, and how the skew is spread: here copies save the same share on every rank",
        lambda: copies(5.0),
        "It is beyond what even choices can save. Where several choices of a token lie on one rank, one copy saves "
        "more, up to the number of choices; loads alone do not say how many do.",
    ),
    Claim(
        "Megatron-core #6959",
        "shortcut MoE, EP 16 to 64, whole step",
        (1.047, 1.121),
        False,
        "model (here DeepSeek-V3-16B), GPUs (here H100), batch, what the baseline hides already; two more norms",
        shortcuts,
        "The published gain, with 82 to 95 % of the all-to-all hidden, means that 5 to 13 % of its baseline's step was "
        "exposed communication. Here it is more: experts of 1408 are narrow, and the baseline hides nothing.",
    ),
    Claim(
        "Megatron-core",
        "1F1B overlap, 64 H100, whole step",
        (1.078, 1.078),
        True,
        "model, batch, pipeline stages; passes of other micro-batches beside the all-to-all are not simulated",
        lambda: limits(deepseek_16b(), "8x8xH100-8x400g", 64, (8, 64)),
    ),
    Claim(
        "torchtitan 0.3.0",
        "DeepSeek-V3-16B, 32 GPUs, 7670 to 9775 tokens/s",
        (1.27, 1.27),
        True,
        "GPUs (here H100), EP, what changed between the two; other kernels would count, too",
        lambda: limits(deepseek_16b(), "8x8xH100-8x400g", 32, (8, 32)),
    ),
    Claim(
        "NetMoE",
        "samples moved to the ranks of their experts, 32 A800, whole step",
        (1.67, 1.67),
        True,
        "model (here GPT2-MoE-Medium and GPT3-MoE-XL with 32 experts), network, batch, skew",
        net_moe,
        "The limit is near it. A slower network, narrower experts or exchanges that reach less of their links lift it.",
    ),
)
NOT_SIMULATED = {
    "LongCat-Flash": "states no speed-up of its shortcut over the same model without one in what we know of it",
    "DisagMoE 1.81, MegaScale-MoE 1.88, FlowMoE 1.13–1.82, FSMoE 1.19–3.01, Comet 1.71, LAER-MoE 1.69": "baselines, "
    "models, batches and layouts of these are not known to us; the ranges would span them all",
}


def record_of(command: str) -> dict[str, Any]:
    """Everything that the page shows."""
    rows = []
    for claim in CLAIMS:
        simulated = dict(claim.ratios())
        rows.append(
            {
                "source": claim.source,
                "what": claim.what,
                "published": claim.published,
                "is_limit": claim.is_limit,
                "unknown": claim.unknown,
                "simulated": simulated,
                "note": claim.note,
                "agrees": agrees(claim, list(simulated.values())),
            }
        )
    return {
        "benchmark": "benchmarks.predict.others",
        "command": command,
        "environment": environment("none: simulated"),
        "rows": rows,
        "not_simulated": NOT_SIMULATED,
    }


def agrees(claim: Claim, found: Sequence[float]) -> bool:
    """Whether the published range meets the simulated one, or stays below the limit."""
    low, high = claim.published
    return low <= max(found) if claim.is_limit else low <= max(found) and high >= min(found)


def page(record: dict[str, Any]) -> str:
    """The record as Markdown."""

    def cells() -> Iterator[list[str]]:
        for row in record["rows"]:
            low, high = row["published"]
            found = row["simulated"]
            least, most = min(found, key=found.get), max(found, key=found.get)
            yield [
                f"{row['source']}: {row['what']}",
                f"{low:.2f}" if low == high else f"{low:.2f}–{high:.2f}",
                f"at most {found[most]:.2f} ({most})"
                if row["is_limit"]
                else f"{found[least]:.2f} ({least}) – {found[most]:.2f} ({most})",
                "yes" if row["agrees"] else "no",
                row["unknown"],
            ]

    lines = [
        "# Simulated: speed-ups that others published",
        "",
        code(record["command"]),
        "",
        f"{environment_text(record['environment'])}.",
        "",
        "“Published” numbers are their authors', each against its own baseline. “Simulated” is the range over settings "
        "that are not stated. “At most” is the limit of any method that hides the all-to-all: the same step without "
        "what is exposed of it. A range that contains a number confirms little.",
        "",
        *table(["", "published", "simulated", "agrees", "not stated"], cells()),
        "",
        *(f"- {row['source']}, {row['what']}: {row['note']}" for row in record["rows"] if not row["agrees"]),
        "",
        "Not simulated: " + "; ".join(f"{name}: {why}" for name, why in record["not_simulated"].items()) + ".",
    ]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, metavar="DIR", help="writes plan_others.json and .md there")
    args = parser.parse_args(argv)
    record = record_of("python -m benchmarks.predict.others")
    print(page(record))
    if args.output:
        (args.output / "plan_others.json").write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", "utf-8")
        (args.output / "plan_others.md").write_text(page(record), "utf-8")


if __name__ == "__main__":
    main()

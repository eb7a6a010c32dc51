"""Rows of our own records as the planner for clusters sees them: a model, a method and a layout of the same shape."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks.harness.pace import Pace
from benchmarks.harness.variants import BASELINES, SHAPES, STOCK, TABLES, Shape, Variant
from benchmarks.speed import end_to_end
from scmoe_ds.planner.rounds import Spread
from scmoe_ds.simulate.layout import Layout
from scmoe_ds.simulate.method import Method
from scmoe_ds.simulate.model import Experts, Model, Stage

Unit = Literal["pair", "micro-batch", "evaluation", "iteration"]


@dataclass(frozen=True)
class Row:
    """A measured row and what is to be predicted of it.

    Attributes:
        record: file name of the record, without its suffix.
        mode: of the record: "forward" or "train".
        unit: what was timed: a pair of blocks alone, or of a whole GPT a micro-batch without the all-reduce, a forward
            pass with its loss, an iteration with all-reduce and optimizer.
        rate_mbit: of the link, each direction.
        ms: measured; median, 10th and 90th percentile.
        speedup: measured, over the record's first row.
        base: name of that row.
        counts: of chunks that the row's plan may choose from; None: all, where they are worth it.
        communicates: False: a local copy in the place of the link.
        primitive: of its all-to-alls.
        expert_counts: tokens of every expert in each MoE layer, of one rank; none: not recorded.
        pace: how fast the machine was; nothing: not recorded.
    """

    record: str
    name: str
    mode: Literal["forward", "train"]
    unit: Unit
    rate_mbit: float
    ms: Spread
    speedup: Spread
    base: str
    model: Model
    method: Method
    layout: Layout
    counts: tuple[int, ...] | None
    communicates: bool = True
    primitive: str = "send_receive"
    expert_counts: tuple[tuple[float, ...], ...] = ()
    pace: Pace = ()

    @property
    def key(self) -> tuple[str, str, str]:
        """Of the row in its record."""
        return self.unit, self.mode, self.name


def method_of(
    name: str, section: dict[str, Any], overlap: bool, counts: tuple[int, ...] | None, factor: float
) -> Method | None:
    """A row's "scmoe" section as a method; None for architectures that the planner for clusters does not have."""
    known = {
        "topk": ("topk", "deepspeed"),
        "shared_expert": ("shared_expert", "deepspeed"),
        "pipelined_topk": ("topk", "scmoe_ds"),
        "overlapped_shared_expert": ("shared_expert", "scmoe_ds"),
        "scmoe": ("scmoe", "scmoe_ds"),
    }
    if section["architecture"] not in known:
        return None
    architecture, layer = known[section["architecture"]]
    return Method(
        name,
        architecture,  # type: ignore[arg-type]
        layer,  # type: ignore[arg-type]
        routed=section.get("top_k", 2 if layer == "deepspeed" and architecture == "topk" else 1),
        dispatch="padded" if layer == "deepspeed" else section["dispatch"],
        position=section.get("position"),
        overlap=overlap and layer != "deepspeed",
        most_chunks=max(counts or (4,)),
        capacity_factor=factor,
    )


def model_of(shape: Shape, num_experts: int, layers: int = 2, vocabulary: int = 64) -> Model:
    """A GPT of the shape: its second of every two blocks has an MoE of `num_experts`."""
    inner = 4 * shape.hidden_size
    stage = Stage(
        layers=layers,
        hidden=shape.hidden_size,
        tokens=shape.seq_length,
        span=shape.seq_length,
        heads=shape.heads,
        kv_heads=shape.heads,
        head_dim=shape.hidden_size // shape.heads,
        mlp_hidden=inner,
        moe_layers=tuple(range(1, layers, 2)),
        experts=Experts(num_experts=num_experts, hidden=inner, top_k=2),
    )
    return Model(name=shape.name, stages=(stage,), vocabulary=vocabulary, positions=shape.seq_length)


def layout_of(shape: Shape, ranks: int, training: bool, accumulation: int = 1) -> Layout:
    """One rank on each node, and as many expert-parallel ranks."""
    return Layout(
        world=ranks,
        expert_parallel=ranks,
        micro_batch=shape.sequences,
        accumulation=accumulation,
        precision="fp32",
        training=training,
    )


Record = dict[str, Any]


def measured_in(path: Path) -> Record:
    """What a record of `benchmarks.speed.block` or `benchmarks.speed.end_to_end` has measured of whole rows."""
    record = json.loads(path.read_text())
    kept = {key: record[key] for key in ("command", "environment", "settings", "links")}
    if "rows" in record:
        return kept | {"rows": record["rows"], "pace": record.get("pace", [])}
    fields = ("variant", "median_ms", "p10_ms", "p90_ms", "speedup")
    modes = {
        mode: {
            "rows": [{field: row[field] for field in fields} for row in found["rows"]],
            "expert_counts": found.get("expert_counts", []),
            "pace": found.get("pace", []),
        }
        for mode, found in record["modes"].items()
    }
    return kept | {"table": record["table"], "modes": modes}


def rows_of(name: str, record: Record) -> list[Row]:
    """All rows of `measured_in` that the planner for clusters has: not DGMoE's."""
    return list(_whole_rows(name, record) if "rows" in record else _pair_rows(name, record))


def _pair_rows(name: str, record: dict[str, Any]) -> Iterator[Row]:
    settings, shape, ranks = record["settings"], SHAPES[record["settings"]["shape"]], record["settings"].get("nodes", 2)
    table = TABLES[record["table"]](settings["dispatch"])
    base = STOCK if record["table"] == "ablation" else BASELINES[settings["dispatch"]]
    for mode, found in record["modes"].items():
        for row in found["rows"]:
            variant: Variant = table[row["variant"]]
            counts = _counts(variant)
            method = method_of(row["variant"], dict(variant.section), variant.overlap, counts, shape.capacity_factor)
            if method is None:
                continue
            experts = max(shape.num_experts, -(-variant.section.get("top_k", 1) // ranks) * ranks)
            yield Row(
                record=name,
                name=row["variant"],
                mode=mode,
                unit="pair",
                rate_mbit=record["links"][mode]["rate_mbit"],
                ms=Spread(row["median_ms"], row["p10_ms"], row["p90_ms"]),
                speedup=Spread(**row["speedup"]),
                base=base,
                model=model_of(shape, experts),
                method=method,
                layout=layout_of(shape, ranks, mode == "train"),
                counts=counts,
                communicates=variant.communicates,
                primitive=variant.method or settings["method"],
                expert_counts=(tuple(found["expert_counts"]),) if len(found["expert_counts"]) == experts else (),
                pace=found["pace"],
            )


def _counts(variant: Variant) -> tuple[int, ...] | None:
    if variant.chunks == "auto":
        return None
    return variant.chunks if isinstance(variant.chunks, tuple) else (variant.chunks,)


def _whole_rows(name: str, record: dict[str, Any]) -> Iterator[Row]:
    settings, shape = record["settings"], end_to_end.SHAPE
    sections = end_to_end.architectures(settings["dispatch"])
    units: dict[str, Unit] = {"micro_batch": "micro-batch", "evaluation": "evaluation", "iteration": "iteration"}
    for row in record["rows"]:
        section = {"dispatch": settings["dispatch"], **sections[row["variant"]]}
        auto = section.get("overlap", {}).get("num_chunks", "auto") == "auto"
        counts = None if auto else (1,)
        section.setdefault("top_k", 2 if section["architecture"] in ("topk", "pipelined_topk") else 1)
        method = method_of(row["variant"], section, True, counts, shape.capacity_factor)
        if method is None:
            continue
        for key, unit in units.items():
            if f"{key}_ms" not in row:
                continue
            middle = row[f"{key}_ms"]
            yield Row(
                record=name,
                name=row["variant"],
                mode="forward" if unit == "evaluation" else "train",
                unit=unit,
                rate_mbit=record["links"]["train"]["rate_mbit"],
                ms=Spread(middle, row.get(f"{key}_p10_ms", middle), row.get(f"{key}_p90_ms", middle)),
                speedup=Spread(**row[f"{key}_speedup"]),
                base=record["rows"][0]["variant"],
                model=model_of(shape, shape.num_experts, end_to_end.LAYERS, end_to_end.VOCABULARY),
                method=method,
                layout=layout_of(shape, 2, unit != "evaluation", settings["accumulation"]),
                counts=counts,
                primitive=settings["method"],
                pace=record["pace"],
            )

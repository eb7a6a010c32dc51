"""The paper's table of offloaded experts: resident, fetched late, fetched early; latency and memory of each."""

from __future__ import annotations

import tempfile
from pathlib import Path

from benchmarks.gpu.notes import Notes
from benchmarks.gpu.setting import Setting
from benchmarks.gpu.timing import text
from benchmarks.serving import offload, offload_worker
from scmoe_ds.planner.rounds import Spread

PLACES = 2


def run(notes: Notes, setting: Setting) -> None:
    """The step: GPT2-MoE-Medium with 8 experts in bf16, one token at a time, experts in pinned host memory."""
    shape, rounds, tokens = setting.size(("medium", 5, 16), ("tiny", 1, 4))
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "model"
        offload_worker.write_model(shape, "scmoe", "pos2", "bf16", path)
        flags = {"path": str(path), "dtype": setting.size("bf16", "fp32"), "places": PLACES}
        found = offload_worker.measure(flags, offload_worker.MODES, rounds, tokens, in_process=setting.rehearsal)
    entries = {entry["row"].split()[-1]: entry for entry in offload.table(found, "ScMoE")}
    for mode, entry in entries.items():
        removed = entry["removed_percent"]
        cells = {"experts": mode, "ms per pair": text(Spread(**entry["pair_ms"]))}
        cells |= {"against resident, %": text(Spread(**entry["extra_percent"]), 0)}
        cells |= {"extra latency removed, %": text(Spread(**removed), 0) if removed else "–"}
        cells |= {"memory of resident": f"{entry['memory_of_resident']:.2f}"}
        cells |= {"same text": "yes" if entry["same_text"] else "NO"}
        notes.row("Offloaded experts", **cells)
    early = entries["offload-async"]
    notes.number("offloading: memory of resident", early["memory_of_resident"])
    if early["removed_percent"]:
        notes.number("offloading: extra latency removed", early["removed_percent"]["median"] / 100)
    notes.number("offloading: texts that differ", sum(not entry["same_text"] for entry in entries.values()))

"""What a disk gives past the page cache: by the length of a read, the number of them at once, and the pages read to.

    python -m benchmarks.serving.offload_disk --output benchmarks/results

Threads read from random places of one file (O_DIRECT), each into memory of its own, as offloaded experts are read. The
combinations take turns, and the median of the rounds is reported with its 10th and 90th percentile. The processor's
time is that of the process, and counts what the kernel does for it.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks.harness.measure import environment
from benchmarks.harness.on_nodes import write
from scmoe_ds.analysis.markdown import code
from scmoe_ds.offload.files import ExpertFile
from scmoe_ds.offload.pages import page_aligned, page_memory
from scmoe_ds.planner.rounds import Spread

SIZES_KIB = (256, 1024, 4096, 16384)
DEPTHS = (1, 2, 4, 8)
PAGES = ("4 KiB", "huge")


def memory(nbytes: int, pages: str) -> Tensor:
    """[nbytes] uint8 from the start of a page, written to once."""
    if pages == "huge":
        return page_memory(nbytes).fill_(1)
    return page_aligned(nbytes).fill_(1)


def rate(file: ExpertFile, file_bytes: int, buffers: list[Tensor], total: int, seed: int) -> tuple[float, float]:
    """GB/s with one thread for each buffer, and the share of a core that it takes."""
    nbytes = buffers[0].numel()

    def work(number: int) -> None:
        places, view = random.Random(seed * len(buffers) + number), buffers[number].numpy().data
        for _ in range(max(1, total // nbytes // len(buffers))):
            file.read(places.randrange(file_bytes // nbytes) * nbytes, nbytes, [view])

    with ThreadPoolExecutor(len(buffers)) as pool:
        cpu, start = time.process_time(), time.perf_counter()
        list(pool.map(work, range(len(buffers))))
        seconds = time.perf_counter() - start
        read = max(1, total // nbytes // len(buffers)) * len(buffers) * nbytes
        return read / seconds / 1e9, (time.process_time() - cpu) / seconds


def markdown(record: dict[str, Any]) -> str:
    """A table for each kind of pages."""
    where = record["environment"]
    lines = [
        "# What the disk gives past the page cache",
        "",
        f"{code(record['command'])}, {where['date']}, {where['device']}, commit {where['commit']}; {record['rounds']} "
        "rounds. GB/s, 10th to 90th percentile, and the share of a core.",
    ]
    for pages in PAGES:
        depths = " | ".join(f"{depth} at once" for depth in DEPTHS)
        lines += ["", f"| into pages of: {pages} | {depths} |", "|---" * (1 + len(DEPTHS)) + "|"]
        for size in SIZES_KIB:
            cells = [f"{size / 1024:g} MiB a read"]
            for depth in DEPTHS:
                row = next(
                    row for row in record["rows"] if (row["pages"], row["kib"], row["depth"]) == (pages, size, depth)
                )
                found, cpu = row["gigabytes_per_s"], row["core"]["median"]
                cells.append(f"{found['median']:.2f} ({found['p10']:.2f}–{found['p90']:.2f}), {cpu:.0%}")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def measure(file: ExpertFile, file_bytes: int, rounds: int, total: int) -> list[dict[str, Any]]:
    """A row for each combination."""
    rows = [(pages, kib, depth) for pages in PAGES for kib in SIZES_KIB for depth in DEPTHS]
    buffers = {(pages, kib): [memory(kib << 10, pages) for _ in range(max(DEPTHS))] for pages, kib, _ in rows}
    found: dict[tuple[str, int, int], list[tuple[float, float]]] = {row: [] for row in rows}
    for number in range(rounds):
        for pages, kib, depth in rows[number % len(rows) :] + rows[: number % len(rows)]:
            own = buffers[pages, kib][:depth]
            found[pages, kib, depth].append(rate(file, file_bytes, own, total, number))
    return [
        {
            "pages": row[0],
            "kib": row[1],
            "depth": row[2],
            "gigabytes_per_s": vars(Spread.of([each for each, _ in values])),
            "core": vars(Spread.of([each for _, each in values])),
        }
        for row, values in found.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--file-mib", type=int, default=4096, help="of the file that is read")
    parser.add_argument("--read-mib", type=int, default=256, help="read at each measurement")
    parser.add_argument("--scratch", type=Path, help="where the file is written; default: the temporary directory")
    parser.add_argument("--output", type=Path, help="directory for JSON and table")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.scratch) as directory:
        path, block = Path(directory) / "file", os.urandom(16 << 20)
        with path.open("wb") as written:
            for _ in range(args.file_mib // 16):
                written.write(block)
            os.fsync(written.fileno())
        rows = measure(ExpertFile(path, "run again"), args.file_mib << 20, args.rounds, args.read_mib << 20)
    said = " ".join(sys.argv[1:]).replace(f" --scratch {args.scratch}", "")  # where, is no part of the record
    command = f"python -m benchmarks.serving.offload_disk {said}"
    record = {"command": command, "environment": environment(), "rounds": args.rounds, "rows": rows}
    text = markdown(record)
    print(text)
    if args.output:
        write(args.output, "offload_disk", record, text)


if __name__ == "__main__":
    main()

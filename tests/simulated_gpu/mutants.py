"""Faults of the communication, each as another text in the package, the settings under which it shows, and as what.

What is not here because it cannot matter: rows that are sent from the main stream need not be held (torch keeps what NCCL
sends until `wait`, and the main stream waits for it); another side stream at each call (each orders what it does by
events of its own); descriptions of choices need not be waited for (they travel before the rows, on the same stream).
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch

from tests.simulated_gpu.cases import Case

RACE, FREED, EARLY, VALUES, WAITS = "race", "use after free", "too early", "values", "waits"
SERIAL = "less of the backbone may run beside transfers"
ONE = Case("scmoe", "pos2", 2, 1, dropout=0.0)
PEERS = replace(ONE, method="send_receive")
PACKED = replace(ONE, wire_dtype="fp8")
CHUNKS = replace(ONE, chunks=2)
PADDED = replace(ONE, chunks=2, dispatch="padded")
SEVERAL = replace(ONE, top_k=2)
ALONE = replace(ONE, expert_parallel=1)
BF16 = replace(ONE, dtype=torch.bfloat16)


class Mutant(NamedTuple):
    """A fault.

    Attributes:
        module: below scmoe_ds.
        old, new: see mutation.mutated.
        shows: what it must be noticed by.
        case: the settings.
    """

    module: str
    old: str
    new: str
    shows: str
    case: Case = ONE


LAUNCHED = 'self._launch(grad, self.sizes.reversed(), "backward", place)'
PACKS = "packed = pack(rows, self.wire_dtype).contiguous()"
COPIED = 'self._tensors = tuple(tensor.to("cpu", non_blocking=True) for tensor in self._tensors)'
ON_SIDE = "with torch.cuda.stream(side_stream(torch.device('cuda', 0))):"

MUTANTS = {
    # comm/all_to_all.py, forward
    "a deferred launch does not wait for the rows": Mutant("comm.all_to_all", "side.wait_event(ready)", "pass", RACE),
    "a deferred launch waits for an event of its own stream": Mutant(
        "comm.all_to_all", "side.wait_event(ready)", "side.wait_event(side.record_event())", RACE
    ),
    "rows that are packed on the side stream are not recorded there": Mutant(
        "comm.all_to_all", "rows.record_stream(side)", "pass", FREED, PACKED
    ),
    "what is being sent is not held": Mutant(
        "comm.all_to_all",
        "self._in_flight = (wait, packed, received, rows.dtype)",
        "self._in_flight = (wait, received, received, rows.dtype)",
        FREED,
        PACKED,
    ),
    "what was sent is not recorded on the stream that waited": Mutant(
        "comm.all_to_all", "for buffer in (packed, received):", "for buffer in (received,):", FREED, PACKED
    ),
    "what was received is not recorded on the stream that waited": Mutant(
        "comm.all_to_all", "for buffer in (packed, received):", "for buffer in (packed,):", FREED
    ),
    "buffers are recorded on the stream that launched": Mutant(
        "comm.all_to_all", "buffer.record_stream(current)", "buffer.record_stream(self._stream)", FREED
    ),
    "the stream of the launch is forgotten": Mutant(
        "comm.all_to_all",
        "self._stream = torch.cuda.current_stream(received.device) if received.is_cuda else None",
        "self._stream = None",
        FREED,
    ),
    "a rank's rows to itself are not waited for": Mutant(
        "comm.all_to_all", "current.wait_stream(self._stream)", "pass", RACE, PEERS
    ),
    "received rows are not waited for": Mutant(
        "comm.all_to_all", "self._in_flight = None\n        if wait is not None:", "if False:", RACE
    ),
    "received rows are waited for on the side stream": Mutant(
        "comm.all_to_all",
        "self._in_flight = None\n        if wait is not None:\n            wait()",
        f"{ON_SIDE}\n            wait()",
        RACE,
    ),
    "chunks are packed into one buffer": Mutant(
        "comm.all_to_all",
        PACKS,
        f"{PACKS}; packed = vars(self.transport).setdefault('buffer', torch.empty_like(packed)).copy_(packed)",
        RACE,
        PADDED,
    ),
    # backward
    "a gradient is not waited for": Mutant(
        "comm.all_to_all",
        "ctx.gradient.take([transfer.finish() for transfer in ctx.transfers])",
        "ctx.gradient.take([transfer._in_flight[2] for transfer in ctx.transfers])",
        RACE,
    ),
    "a gradient is sent from the side stream": Mutant(
        "comm.all_to_all", LAUNCHED, f"\n        {ON_SIDE}\n            {LAUNCHED}", RACE
    ),
    "two chunks' gradients arrive in the same rows": Mutant(
        "comm.all_to_all",
        "return self._whole[first_row : first_row + rows]",
        "return self._whole[:rows]",
        VALUES,
        CHUNKS,
    ),
    "a gradient's memory is filled again while it is sent": Mutant(
        "comm.all_to_all", LAUNCHED, f"{LAUNCHED}; grad.zero_()", RACE
    ),
    "rows that stayed get a gradient before the others have arrived": Mutant(
        "comm.all_to_all",
        "self._whole = like.new_empty(self.rows, *like.shape[1:])",
        "self._whole = like.new_empty(self.rows, *like.shape[1:])\n        else:\n            self._whole.zero_()",
        RACE,
        CHUNKS,
    ),
    # what is right, and too late
    "a deferred launch waits for the main stream": Mutant(
        "comm.all_to_all", "side.wait_event(ready)", "side.wait_stream(torch.cuda.current_stream())", SERIAL
    ),
    "the side stream is the main one": Mutant(
        "comm.side_stream",
        "torch.cuda.Stream(device, priority=-1)",
        "torch.cuda.current_stream()",
        SERIAL,
    ),
    "a launch is waited for at once": Mutant(
        "comm.all_to_all", "if self.blocking and wait is not None:", "if wait is not None:", SERIAL
    ),
    "a gradient's launch is waited for at once": Mutant(
        "comm.all_to_all", LAUNCHED, f"{LAUNCHED}; self._in_flight[0]()", SERIAL
    ),
    # comm/counts.py
    "nothing of the counts is held": Mutant(
        "comm.counts", "self._held: tuple[Tensor, ...] = (sent, local, received)", "self._held = ()", FREED
    ),
    "counts that are sent are not held": Mutant(
        "comm.counts",
        "self._held: tuple[Tensor, ...] = (sent, local, received)",
        "self._held = (local, received)",
        FREED,
        CHUNKS,
    ),
    "counts are let go before they have reached the host": Mutant(
        "comm.counts",
        "self._on_host.synchronize()\n        self._held = ()",
        "self._held = ()\n            self._on_host.synchronize()",
        FREED,
    ),
    "counts are copied before they have been made": Mutant(
        "comm.counts", "side.wait_stream(torch.cuda.current_stream(side.device))", "pass", RACE, ALONE
    ),
    "counts are copied before they have arrived": Mutant(
        "comm.counts", "                self._wait()\n", "                pass\n", RACE
    ),
    "the copies' event is recorded before them": Mutant(
        "comm.counts", COPIED, f"early = side.record_event(); side.record_event = lambda: early; {COPIED}", EARLY
    ),
    "counts are copied on the main stream": Mutant(
        "comm.counts", "with torch.cuda.stream(side):", "with torch.cuda.stream(None):", EARLY
    ),
    "the host reads counts without waiting": Mutant("comm.counts", "self._on_host.synchronize()", "pass", EARLY),
    "counts are copied to pageable memory": Mutant("comm.counts", 'to("cpu", non_blocking=True)', 'to("cpu")', WAITS),
    "the host waits for the device": Mutant(
        "comm.counts", "self._on_host.synchronize()", "torch.cuda.synchronize(); self._on_host.synchronize()", WAITS
    ),
    "the largest capacity is read before it has arrived": Mutant(
        "comm.counts", "group=group)\n    return count", "group=group, async_op=True)\n    return count", RACE, PADDED
    ),
    # comm/transport.py
    "a collective's work is not waited for": Mutant(
        "comm.transport", "            with _named(self.group):\n                work.wait()", "            pass", RACE
    ),
    "sends and receives are not waited for": Mutant("comm.transport", "work.wait(*limit)", "pass", RACE, PEERS),
    "the host waits for sends and receives": Mutant(
        "comm.transport", "limit = () if rows.is_cuda else", "limit =", WAITS, PEERS
    ),
    "a rank's rows to itself come from another stream": Mutant(
        "comm.transport",
        "incoming[me].copy_(outgoing[me])",
        "\n        with torch.cuda.stream(torch.cuda.Stream()):\n            incoming[me].copy_(outgoing[me])",
        RACE,
        PEERS,
    ),
    # moe/routed.py
    "rows are encoded on another stream": Mutant(
        "moe.routed",
        "rows_RD = layout.encode(tokens_TD)",
        "\n        with torch.cuda.stream(torch.cuda.Stream()):\n            rows_RD = layout.encode(tokens_TD)",
        RACE,
        BF16,
    ),
    "sent counts are overwritten": Mutant(
        "moe.routed",
        'self._counts = start_counts(sent, exchange.transport, recorder.watch("counts", 0), local)',
        'self._counts = start_counts(sent, exchange.transport, recorder.watch("counts", 0), local); sent.zero_()',
        RACE,
    ),
    "the experts' output is overwritten while it is sent": Mutant(
        "moe.routed", "exchange.wire_dtype, watch))", "exchange.wire_dtype, watch)); output_SD.detach().zero_()", RACE
    ),
    "counts are read before they have arrived": Mutant(
        "moe.routed",
        "return counts.wait()",
        "return tuple(each.tolist() for each in counts._tensors)",
        EARLY,
    ),
    "received counts go back to the device": Mutant(
        "moe.routed", "torch.tensor(told).view", "torch.tensor(told, device='cuda').view", WAITS
    ),
    "experts compute on rows that are arriving": Mutant(
        "moe.routed",
        "self._dispatches[chunk].wait()",
        "self._dispatches[chunk]._transfer._in_flight[2]",
        RACE,
    ),
    "results are decoded while they are arriving": Mutant(
        "moe.routed",
        "[combine.wait() for combine in self._combines]",
        "[combine._transfer._in_flight[2] for combine in self._combines]",
        RACE,
    ),
    # moe/received.py
    "each rank's rows are counted from the first of all": Mutant(
        "moe.received", "row_numbers(described_C2) + first_C", "row_numbers(described_C2)", VALUES, SEVERAL
    ),
    "where each rank's rows start is copied from pageable memory": Mutant(
        "moe.received", "to_device(places, described_C2.device)", "places.to(described_C2.device)", WAITS, SEVERAL
    ),
    "the host asks how many choices have arrived": Mutant(
        "moe.received", "(choices_X, output_size=described_C2.shape[0])", "(choices_X)", WAITS, SEVERAL
    ),
    "received rows are ordered by an index of the host": Mutant(
        "moe.received",
        "return torch.cat([block for b in range(stride) for block in blocks[b::stride]])",
        "order = torch.arange(rows_SD.shape[0]).split([each.shape[0] for each in blocks])\n"
        "    return rows_SD[torch.cat([block for b in range(stride) for block in order[b::stride]])]",
        WAITS,
    ),
}

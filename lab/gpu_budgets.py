"""What a pair may cost the host of a GPU. The simulated device's tests read it, and so does a run on a real one.

A launch is what a device with kernels for it starts once: a grouped product, a sort and a Triton kernel count as one.
"""

HOST_WAITS_FORWARD = 1
"""Per MoE layer and forward pass: for the row counts, whatever the dispatch, the chunks and the dtype are."""
HOST_WAITS_BACKWARD = 0

LAUNCHES_FORWARD = 49
LAUNCHES_BACKWARD = 82
"""Per pair: two blocks, top-1, two local experts on each of two ranks, exact rows, one chunk, bf16, no dropout."""
GATE_LAUNCHES_FORWARD = 8
"""Of these, the gate's."""

PLAIN_LAUNCHES_FORWARD = 77
PLAIN_LAUNCHES_BACKWARD = 89
PLAIN_GATE_LAUNCHES_FORWARD = 36
"""The same three without Triton."""

SEVERAL_LAUNCHES_FORWARD = 135
SEVERAL_LAUNCHES_BACKWARD = 114
SEVERAL_GATE_LAUNCHES_FORWARD = 45
"""The same three for top-2, without Triton: rows are copies of tokens, one for each rank."""

"""The steps of an acceptance run, in the order in which they run: what is right first, then what is fast."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Step:
    """One question, and the function that answers it in a process of its own.

    Attributes:
        function: "module:name"; it takes `Notes` and a `Setting`.
        limit_s: it is killed after so many seconds. It takes about a third of them.
        environment: variables of its process on a GPU.
    """

    name: str
    question: str
    function: str
    limit_s: float
    environment: Mapping[str, str] = field(default_factory=dict, hash=False)


ONE_GPU = [
    Step("fp32", "Are fp32 losses those of the CPU?", "benchmarks.gpu.losses:against_the_cpu", 90),
    Step(
        "cases",
        "Do the cases of the simulated device compute the same on this one, without a race?",
        "benchmarks.gpu.device_cases:run",
        120,
        {"TORCH_CUDA_SANITIZER": "1"},
    ),
    Step("launches", "Does a pair keep the budgets of launches and host waits?", "benchmarks.gpu.launches:run", 60),
    Step("stages", "How near is each stage to the card's ceilings?", "benchmarks.gpu.stages:run", 90),
    Step("overlap", "How much of a transfer does the schedule hide?", "benchmarks.gpu.hidden:run", 90),
    Step("training", "How fast does gpt2_moe_small train?", "benchmarks.gpu.throughput:train_small", 90),
    Step("generation", "How fast is text generated?", "benchmarks.gpu.throughput:generate", 60),
    Step("offloading", "What do offloaded experts cost and save?", "benchmarks.gpu.offloading:run", 120),
    Step("bf16", "Does bf16 learn as fp32 does?", "benchmarks.gpu.losses:bf16_curve", 90),
    Step("tests", "Do the tests that need a GPU pass?", "benchmarks.gpu.suites:gpu_tests", 240),
]
TWO_GPUS = [
    Step("cases", "Are two ranks right, each case by itself?", "benchmarks.gpu.two_gpus:cases", 180),
    Step("order", "In which order do exchanges and kernels run?", "benchmarks.gpu.two_gpus:order", 90),
    Step("overlap", "How much of the all-to-all does the schedule hide?", "benchmarks.gpu.two_gpus:hidden", 90),
    Step("killed", "What is said when a rank is killed?", "benchmarks.gpu.killed:run", 120),
]
STEPS = {1: ONE_GPU, 2: TWO_GPUS}

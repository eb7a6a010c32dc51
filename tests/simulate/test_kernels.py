"""Times of kernels against a roofline written down here, and against measured shapes."""

from __future__ import annotations

import random
from typing import Any

import pytest

from scmoe_ds.errors import ClusterError
from scmoe_ds.simulate.cluster import Measured
from scmoe_ds.simulate.kernels import kernel_ms
from scmoe_ds.simulate.work import Kernel
from tests.simulate.clusters import machine


def close(value: float) -> Any:
    return pytest.approx(value, rel=1e-9)


def product(rows: int, inner: int, columns: int, count: int = 1, **changed: Any) -> Kernel:
    flops, numbers = 2.0 * rows * inner * columns, rows * inner + inner * columns + rows * columns
    return Kernel("product", count * flops, 2.0 * count * numbers, (rows, inner, columns), count, **changed)


def test_a_large_product_is_bound_by_computation_and_a_thin_one_by_memory() -> None:
    flops = 2 * 4096**3
    assert kernel_ms(product(4096, 4096, 4096), machine(), "bf16") == (close(1e3 * flops / 1e14), "compute")
    assert kernel_ms(product(4096, 4096, 4096), machine(), "fp32") == (close(1e3 * flops / 1e13), "compute")
    thin = 2 * (4096 + 4096**2 + 4096)
    assert kernel_ms(product(1, 4096, 4096), machine(), "bf16") == (close(1e3 * thin / 1e12), "memory")


def test_no_launch_is_shorter_than_the_host_needs() -> None:
    small = Kernel("reduction", bytes=1e3, launches=7)
    assert kernel_ms(small, machine(launch=1e-5), "bf16") == (close(7e-2), "launch")
    assert kernel_ms(small, machine(), "bf16") == (close(1e-6), "memory")


def test_attention_and_products_of_unknown_shape() -> None:
    attention = Kernel("attention", 1e12, 1e8, (2048, 64, 256))
    assert kernel_ms(attention, machine(), "bf16") == (close(10.0), "compute")
    assert kernel_ms(Kernel("product", 1e9, 1e10), machine(), "bf16") == (close(10.0), "memory")


def test_the_last_wave_of_tiles_is_not_full() -> None:
    gpu = machine(multiprocessors=100, bandwidth=1e18)

    def ms(columns: int) -> float:
        return kernel_ms(product(2560, 10**6, columns), gpu, "bf16")[0]

    full = 1e3 * 2 * 2560 * 1e6 * 1280 / 1e14 * (1e6 + 64) / 1e6 + 2e-3  # 100 tiles of 256 × 128
    assert ms(1280) == close(full)
    # A few columns more need another wave, of smaller tiles; all of it is nearly free.
    assert full < ms(1281) < 1.4 * full and ms(1281) <= ms(1300) <= ms(2560) == pytest.approx(2 * full, rel=1e-3)


def test_small_products_share_the_multiprocessors_by_pieces_of_the_inner_numbers() -> None:
    gpu = machine(multiprocessors=100)
    deep, wide = product(256, 64 * 1024, 256), product(64 * 256, 1024, 256)
    assert kernel_ms(deep, gpu, "bf16")[0] < 2 * kernel_ms(wide, gpu, "bf16")[0]


def test_grouped_products_fill_a_wave_together() -> None:
    gpu = machine(multiprocessors=100)
    one_by_one = product(64, 1024, 1024, count=8)
    together = Kernel("grouped product", one_by_one.flops, one_by_one.bytes, one_by_one.shape)
    ratio = kernel_ms(one_by_one, gpu, "bf16")[0] / kernel_ms(together, gpu, "bf16")[0]
    assert 2 < ratio < 8


def measured(share: float, *shape: int, **changed: Any) -> Measured:
    return Measured(kind=changed.pop("kind", "product"), shape=shape, share=share, **changed)  # type: ignore[arg-type]


def test_at_a_measured_shape_the_measured_share_counts() -> None:
    table = (measured(0.3, 1024, 1024, 1024), measured(0.6, 4096, 1024, 1024), measured(1.5, 4096, 1, 1, kind="rows"))
    for multiprocessors in (0, 108):
        gpu = machine(table=table, multiprocessors=multiprocessors)
        for rows, share in ((1024, 0.3), (4096, 0.6)):
            ms = kernel_ms(product(rows, 1024, 1024), gpu, "bf16")[0]
            assert ms == close(1e3 * 2 * rows * 1024**2 / 1e14 / share)
    assert kernel_ms(Kernel("rows", bytes=4096.0), machine(table=table), "bf16")[0] == close(1e3 * 4096 / 1.5e12)


def test_between_measured_shapes_the_share_is_between_and_far_away_it_is_the_expected_one() -> None:
    gpu = machine(table=(measured(0.3, 1024, 1024, 1024), measured(0.6, 4096, 1024, 1024)))

    def share(rows: int, inner: int = 1024) -> float:
        kernel = product(rows, inner, 1024)
        return kernel.flops / 1e14 / (kernel_ms(kernel, gpu, "bf16")[0] / 1e3)

    assert 0.3 < share(1500) < share(2048) < share(3000) < 0.6
    assert share(2**30, 2**20) > 0.9


def test_measured_shapes_are_of_a_pass_and_a_precision() -> None:
    table = (measured(0.5, 512, 512, 512, phase="backward"), measured(0.1, 512, 512, 512, precision="fp32"))
    gpu, kernel = machine(table=table), product(512, 512, 512)
    ideal = 1e3 * kernel.flops / 1e14
    assert kernel_ms(kernel, gpu, "fp16" if "fp16" in gpu.cluster.gpu.peak else "bf16", "backward")[0] == close(
        ideal / 0.5
    )
    forward = kernel_ms(kernel, gpu, "bf16", "forward")[0]
    assert forward == kernel_ms(kernel, machine(), "bf16")[0]
    assert kernel_ms(kernel, gpu, "fp32")[0] == close(10 * ideal / 0.1)


def test_more_tokens_never_take_less_time() -> None:
    chance = random.Random(0)
    for _ in range(300):
        gpu = machine(multiprocessors=chance.choice((0, 56, 108, 132)))
        shape = [round(2 ** chance.uniform(2, 13)) for _ in range(3)]
        larger = list(shape)
        larger[chance.randrange(3)] += round(2 ** chance.uniform(0, 13))
        ms, larger_ms = (kernel_ms(product(*each), gpu, "bf16")[0] for each in (shape, larger))
        assert ms <= larger_ms * (1 + 1e-12)


def test_a_gpu_without_such_products() -> None:
    old = machine(peak={"fp16": 1e14, "fp32": 1e13})
    with pytest.raises(
        ClusterError, match=r"gpu\.peak = fp16, fp32: round has no bf16 products; train in one of these"
    ):
        kernel_ms(product(64, 64, 64), old, "bf16")

"""The log's lines for people. docs/training_log.md explains them; log.jsonl has the same numbers with all digits."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from scmoe_ds.training.record import TEACHERS_LOSS

UNKNOWN = "–"


def number(value: float) -> str:
    """Four significant digits: 4.217, 0.0003, 1.235e-05."""
    return f"{value:#.4g}" if 1e-3 <= abs(value) < 1e3 else f"{value:.4g}"


def rounded(value: float) -> str:
    """At most four significant digits, with a prefix for large numbers: 0.0003, 37.5, 905, 12345, 123.5k, 1.5M."""
    for size, prefix in ((1e9, "G"), (1e6, "M")):
        if abs(value) >= size:
            return f"{value / size:.4g}{prefix}"
    if abs(value) >= 1e5:
        return f"{value / 1e3:.4g}k"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.4g}"


def three_digits(value: float) -> str:
    """Three significant digits, with zeros at the end, so that columns stay: 0.580, 1.05, 412."""
    return f"{value:.0f}" if value >= 99.95 else f"{value:#.3g}"


def duration(seconds: float) -> str:
    """Seconds in their two largest units: 3d04h, 1h23m, 12m34s, 5s."""
    whole = int(seconds)
    for size, unit, part, of_part in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if whole >= size:
            return f"{whole // size}{unit}{whole % size // part:02d}{of_part}"
    return f"{whole}s"


def step_line(iteration: int, train_iters: int, unit: str, values: Mapping[str, Any], precise: bool = False) -> str:
    """The line of a step.

    Args:
        unit: what is counted: "tokens" or "images".
        values: of the step's entry in the record. What is None was not measured; "hidden" is left out where nothing is
            exchanged.
        precise: all digits, for comparisons.
    """
    long: Callable[[float], str] = repr if precise else number
    short: Callable[[float], str] = repr if precise else rounded
    loss = values.get("lm_loss", values.get("class_loss", math.nan))
    norm = values["grad_norm"]
    parts = [
        f"iter {iteration:{len(str(train_iters))}d}/{train_iters}",
        f"loss {long(loss)}",
        *(f"{name} {long(values[name])}" for name in ("kl", "match") if name in values),
        f"lr {short(values['learning_rate'])}",
        f"grad {UNKNOWN if norm is None else long(norm)}",
        f"{short(values[f'{unit}_per_second'])} {'tok' if unit == 'tokens' else 'img'}/s",
        f"{three_digits(values['tflops'])} TFLOP/s",
    ]
    if values["mfu"] is not None:
        parts.append(f"MFU {100 * values['mfu']:.0f} %")
    parts.append(f"{three_digits(values['memory_gib'])} GiB")
    if "hidden" in values:
        hidden = values["hidden"]
        parts.append(f"hidden {UNKNOWN if hidden is None else f'{100 * hidden:.0f} %'}")
    if values["skipped"]:
        parts.append(f"skipped {values['skipped']}")
    return "  ".join([*parts, f"left {duration(values['seconds_left'])}"])


def validation_line(iteration: int, values: Mapping[str, float], precise: bool = False) -> str:
    """The line of a validation: the loss in nats per token, or per image."""
    show: Callable[[float], str] = repr if precise else number
    line = (
        f"validation at iteration {iteration}  loss {show(values.get('lm_loss', values.get('class_loss', math.nan)))}"
    )
    if "accuracy" in values:
        return f"{line}  accuracy {100 * values['accuracy']:.2f} %"
    line = f"{line}  perplexity {show(values['perplexity'])}"
    return line if TEACHERS_LOSS not in values else f"{line}  loss of the source {show(values[TEACHERS_LOSS])}"

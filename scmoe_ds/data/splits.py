"""What --data-path and --split say: prefixes with weights, and shares of train, valid and test."""

from __future__ import annotations

import math
from collections.abc import Sequence

from scmoe_ds.errors import DataError


def parse_data_path(data_path: Sequence[str], flag: str = "--data-path") -> tuple[list[str], list[float] | None]:
    """Split ``--data-path`` into prefixes and weights (None when it holds prefixes only).

    A number counts as a weight. Write a prefix that looks like one with its directory, ``./7``.

    Args:
        flag: its name, for messages.

    Raises:
        DataError: empty, weights for some prefixes only or out of turn, or a weight that is not a
            positive finite number.
    """
    entries = [entry.strip() for entry in data_path]
    if not entries or not all(entries):
        raise DataError(f"{flag} is empty: give at least one dataset prefix.")
    numbers = [_as_number(entry) for entry in entries]
    if all(number is None for number in numbers):
        return entries, None
    prefixes, weights = entries[1::2], numbers[0::2]
    if len(entries) % 2 or None in weights or any(number is not None for number in numbers[1::2]):
        raise DataError(
            f"{flag} {' '.join(entries)} mixes weights and prefixes: give prefixes only, or weight and "
            "prefix in turn, as in: 0.3 first_text_document 0.7 second_text_document."
        )
    for entry, weight in zip(entries[0::2], weights, strict=True):
        if weight is None or not 0 < weight < math.inf:
            raise DataError(f"{flag} has weight {entry}: weights must be positive finite numbers.")
    return prefixes, [float(weight) for weight in weights if weight is not None]


def split_ranges(split: str, count: int) -> tuple[range, range, range]:
    """Which of ``count`` sequences ``--split`` gives to train, valid and test, as megatron-core rounds them. Raises a
    DataError if ``split`` is not one to three nonnegative numbers with a positive sum."""
    from megatron.core.datasets.blended_megatron_dataset_config import (
        convert_split_vector_to_split_matrix,
        parse_and_normalize_split,
    )

    matrix = convert_split_vector_to_split_matrix(parse_and_normalize_split(plain_split(split)))
    bounds = [(0.0, 0.0) if bookends is None else bookends for bookends in matrix]
    train, valid, test = (range(round(begin * float(count)), round(end * float(count))) for begin, end in bounds)
    return train, valid, test


def split_shares(split: str) -> tuple[float, float, float]:
    """The shares of train, valid and test that ``--split`` names, of 1; those that it leaves out are 0. Raises a
    DataError as ``split_ranges``"""
    shares = [float(share) for share in plain_split(split).split(",")]
    train, valid, test = (round(share / sum(shares), 12) for share in [*shares, 0.0, 0.0][:3])
    return train, valid, test


def plain_split(split: str) -> str:
    """``split`` with its numbers in plain decimals.

    megatron-core takes whatever matches ``[.0-9]+`` for a number: it reads 1e-3 as two, -1 as 1.

    Raises:
        DataError: as ``split_ranges``.
    """
    numbers = [_as_number(part) for part in split.split(",")]
    shares = [number for number in numbers if number is not None and 0 <= number < math.inf]
    if len(shares) != len(numbers) or len(shares) > 3 or sum(shares) <= 0:
        raise DataError(f"--split {split!r} is not a split: give the shares of train, valid and test, as in 969,30,1.")
    return ",".join(f"{share:.12f}".rstrip("0").rstrip(".") for share in shares)


def _as_number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None

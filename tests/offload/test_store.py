"""What moves when: which experts get a place, which give theirs up, and in which order they come."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from scmoe_ds.offload.store import ExpertKey, ExpertStore


class _Events:
    """A source that notes what is asked of it, and whose copies arrive when they are waited for."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def load(self, into: Mapping[str, Tensor], after: object, watch: object) -> Any:
        (name,) = into
        self.seen.append(f"load {name}")
        events, tensor = self.seen, into[name]

        class _Arrival:
            def wait(self) -> None:
                events.append(f"wait {name}")
                tensor.fill_(float(name[1:]))

        return _Arrival()


def store_of(places: int, layers: int = 1) -> tuple[ExpertStore, list[str]]:
    source = _Events()
    slots = [nn.Linear(1, 1, bias=False) for _ in range(places)]
    return ExpertStore(source, lambda key: {"weight": f"e{key.layer}{key.expert}"}, slots, layers), source.seen


def keys(*names: str) -> list[ExpertKey]:
    return [ExpertKey(int(name[0]), int(name[1])) for name in names]


def use(store: ExpertStore, expected: Sequence[ExpertKey]) -> None:
    for key in expected:
        module = store.take(key)
        assert float(next(module.parameters())) == 10 * key.layer + key.expert
        store.release(key)


def test_least_recently_used_goes() -> None:
    store, seen = store_of(2)
    for name in ("00", "01", "00", "02", "00", "01"):
        store.fetch(keys(name))
        use(store, keys(name))
    assert [event for event in seen if event.startswith("load")] == ["load e00", "load e01", "load e02", "load e01"]
    assert (store.counts.used, store.counts.hits, store.counts.migrations) == (6, 2, 4)


def passes(store: ExpertStore, *needed: str) -> list[int]:
    """Migrations of each pass; a word has the experts that it needs."""
    counts = [store.counts.migrations]
    for word in needed:
        for name in word.split():
            store.fetch(keys(name))
            use(store, keys(name))
        counts.append(store.counts.migrations)
    return [after - before for before, after in pairwise(counts)]


def test_the_expert_goes_whose_turn_is_farthest_away() -> None:
    """Fewer places than layers: the least recently used expert is that of the next layer, and none would be found."""
    same = ["00 10 20 30"] * 4
    assert passes(store_of(3, layers=4)[0], *same) == [4, 1, 1, 2]  # Belady: every third
    assert passes(store_of(3)[0], *same) == [4, 4, 4, 4]


def test_an_expert_that_is_no_longer_needed_goes_first() -> None:
    """The one that has let its turns pass, though its layer's turn comes before that of others."""
    store, _ = store_of(3, layers=2)
    assert passes(store, "00 10", "01 10", "01 10", "01 11", "01 10") == [2, 1, 0, 1, 0]


def test_more_experts_than_places_stream_through() -> None:
    """All are asked for at once; the next one starts as soon as one has been used, never before."""
    store, seen = store_of(2)
    expected = keys("10", "11", "12", "13")
    store.fetch(expected)
    assert seen == ["load e10", "load e11"]
    use(store, expected)
    assert seen == ["load e10", "load e11", "wait e10", "load e12", "wait e11", "load e13", "wait e12", "wait e13"]


def test_asked_for_twice_and_out_of_order() -> None:
    """Two chunks of one layer, or two layers in flight, with less room than all of it takes."""
    store, _ = store_of(2)
    store.fetch(keys("00", "01"))
    store.fetch(keys("01", "00"))
    use(store, keys("00", "01", "01", "00"))
    store.fetch(keys("00", "01", "02"))
    use(store, keys("02", "01", "00"))
    assert not store._asked and not store._waiting


def test_guesses_give_way() -> None:
    store, seen = store_of(3)
    store.guess(keys("00", "01"))
    store.fetch(keys("01", "02"))
    use(store, keys("01", "02"))
    assert (store.counts.predicted, store.counts.confirmed, store.counts.hits) == (2, 1, 1)
    store.fetch(keys("10", "11", "12"))
    store.guess(keys("03"))  # no place that nobody has asked for: not fetched
    use(store, keys("10", "11", "12"))
    assert "load e03" not in seen

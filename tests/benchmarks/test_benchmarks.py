"""The parts of the benchmarks that compute rather than measure: ratios, rows, tables, figures, the search for a rate."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import redraw
from benchmarks.harness import rows, tables
from benchmarks.harness.link import HIGHEST_MBIT, LOWEST_MBIT, next_rate
from benchmarks.harness.parts import EXPOSED, KINDS, REST_OF_LAYER, layer_ms, parts_of
from benchmarks.harness.planned import Calibrated, schedule_of
from benchmarks.harness.variants import (
    AGAIN,
    BASELINES,
    STOCK,
    TABLES,
    Variant,
    baseline,
    limit_of,
    main_table,
    selected,
)
from benchmarks.speed import bars, end_to_end, replace
from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.models.layers import GPTSettings
from scmoe_ds.overlap.schedule import Schedule
from scmoe_ds.planner.rounds import Spread, interleave
from scmoe_ds.planner.times import ChunkTimes, OperatorTime, OperatorTimes, PassTimes
from scmoe_ds.trace.recorder import Lane, Span


def both(forward_ms: float, backward_ms: float) -> PassTimes:
    return PassTimes(forward_ms=forward_ms, backward_ms=backward_ms)


# Dispatch and combine take 4 ms each, forward as backward; mlp 3, attention 2, shared 4 (backward twice that).
TIMES = OperatorTimes(
    gate=both(1, 2),
    encode=both(0, 0),
    decode=both(1, 2),
    backbone=tuple(
        OperatorTime(name=name, forward_ms=ms, backward_ms=2 * ms)
        for name, ms in [("mlp", 3), ("attention", 2), ("shared", 4)]
    ),
    chunks={1: ChunkTimes(dispatch=both(4, 4), experts=both(5, 10), combine=both(4, 4))},
)
CALIBRATED = Calibrated(TIMES, before_tap=both(2, 3))


# --- ratios within rounds


def test_spread_is_of_the_ratios_within_rounds_not_of_the_medians():
    fast, slow = [1.0, 10.0, 2.0], [2.0, 20.0, 3.0]
    assert Spread.of_ratios(slow, fast) == Spread(median=2.0, p10=1.5, p90=2.0)


def test_percentiles_leave_a_tenth_out_on_either_side():
    assert Spread.of(list(range(31))) == Spread(median=15, p10=3, p90=27)


def test_interleave_rotates_the_order_and_drops_warm_up():
    called: list[str] = []
    times = interleave({name: lambda name=name: called.append(name) for name in "abc"}, rounds=2, warm_up=1)
    assert "".join(called) == "cab" + "abc" + "bca"
    assert {name: len(values) for name, values in times.items()} == {"a": 2, "b": 2, "c": 2}


# --- the link


def test_next_rate_hits_the_share_if_time_goes_with_one_over_rate():
    megabits, other_ms, share = 30.0, 200.0, 0.6

    def times_ms(rate: float) -> tuple[float, float]:
        return 1e3 * megabits / rate, 1e3 * megabits / rate + other_ms

    rate = next_rate(400.0, *times_ms(400.0), share)
    communication, total = times_ms(rate)
    assert communication / total == pytest.approx(share)
    assert next_rate(rate, communication, total, share) == pytest.approx(rate)


def test_next_rate_stays_within_what_the_link_can_do():
    assert next_rate(400.0, 1e-6, 1000.0, 0.9) == LOWEST_MBIT
    assert next_rate(400.0, 999.0, 1000.0, 0.01) == HIGHEST_MBIT


# --- variants


@pytest.mark.parametrize("dispatch", BASELINES)
@pytest.mark.parametrize("name", TABLES)
def test_every_row_is_a_valid_section(name: str, dispatch: str):
    for variant in TABLES[name](dispatch).values():
        section = {"num_experts": 4, "expert_parallel_size": 2, **variant.section}
        config = ScMoEConfig.from_deepspeed({"scmoe": section})
        assert config.is_scheduled == variant.is_scheduled


@pytest.mark.parametrize("dispatch", BASELINES)
def test_main_table_has_one_dispatch_but_for_rows_named_stock(dispatch: str):
    table = main_table(dispatch)
    assert table[BASELINES[dispatch]] == table[BASELINES[dispatch] + AGAIN] == next(iter(baseline(dispatch).values()))
    for name, variant in table.items():
        if variant.is_scheduled:
            assert variant.section["dispatch"] == dispatch
        else:
            assert dispatch == "padded" or "stock" in name


def test_limit_is_the_same_pair_without_communication():
    table = main_table("padded")
    assert limit_of("ScMoE Pos-3, chunked", table) == "ScMoE Pos-3, no communication"
    assert limit_of("ScMoE Pos-3, no communication", table) is None
    assert limit_of("ScMoE-2 Pos-2, overlapped", table) is None
    assert limit_of(STOCK, table) is None


def test_selected_rows_bring_baseline_and_limit():
    found = selected(main_table("padded"), STOCK, ["Pos-1, serial"])
    assert list(found) == [STOCK, "ScMoE Pos-1, serial", "ScMoE Pos-1, no communication"]


# --- plans and rows


def test_schedules_leave_to_the_planner_what_the_variant_does():
    section = {"architecture": "scmoe", "position": "pos2"}
    assert schedule_of(Variant(section, overlap=False), TIMES, "train") == Schedule(1, overlap=False)
    assert schedule_of(Variant(section, slots=4), TIMES, "train") == Schedule(4)
    # Forward: the dispatch needs mlp and attention, the combine is hidden by shared alone.
    assert schedule_of(Variant(section), TIMES, "forward") == Schedule(3)


def test_prediction_is_the_plan_and_what_comes_before_it():
    # before 2; gate 1; mlp and attention 5 hide the dispatch; experts 5; shared 4 hides the combine; decode 1
    assert CALIBRATED.predicted_ms(Schedule(3), "forward") == 18
    # blocking, forward: 2 + 1 + 4 + 5 + 4 + 9 + 1; backward: 3 + 2 + 8 + 10 + 18 + 2
    assert CALIBRATED.predicted_ms(Schedule(1, overlap=False), "train") == 26 + 43
    assert CALIBRATED.communication_ms("forward") == 8
    assert CALIBRATED.communication_ms("train") == 16
    assert CALIBRATED.window_ms("train") == 27
    row = rows.prediction(CALIBRATED, Schedule(3), "forward", median_ms=20.0)
    assert row == {"schedule": "experts at slot 3", "predicted_ms": 18, "predicted_over_measured": 0.9}


def test_limits_compare_within_rounds():
    table = main_table("padded")
    times = {"ScMoE Pos-2, overlapped": [0.102, 0.203, 0.111], "ScMoE Pos-2, no communication": [0.1, 0.2, 0.11]}
    row = rows.limits("ScMoE Pos-2, overlapped", table, times, CALIBRATED, "train")
    assert row["communication_ms"] == 16
    assert row["exposed_ms"]["median"] == pytest.approx(2.0)
    assert row["hidden_share"] == pytest.approx(1 - 2 / 16)
    assert row["over_no_communication"]["median"] == pytest.approx(203 / 200)
    assert rows.limits(STOCK, table, times, CALIBRATED, "train") == {}


def test_auto_is_compared_with_the_smallest_median():
    table = {name: variant for name, variant in TABLES["slots"]("padded").items() if variant.position == "pos1"}
    times = dict(zip(table, ([1.0, 1.0, 1.0], [0.8, 0.9, 0.7], [0.9, 0.9, 0.9], [0.808, 0.9, 0.7]), strict=True))
    (found,) = rows.auto_over_best(table, times)
    assert found["best"] == "ScMoE Pos-1, slot 2"
    assert found["auto_over_best"] == {"median": 1.0, "p10": 1.0, "p90": pytest.approx(1.01)}


def test_micro_batches_are_sorted_by_their_place_in_the_iteration():
    # two per round, iterations of four, the first of which was half over
    timed = end_to_end.Timed.of([1, 9, 2, 4, 3, 8, 5, 7], accumulation=4, first_place=2)
    assert timed.of_rounds == [1, 3, 3, 6]
    assert timed.boundaries == [9, 8]
    assert timed.iterations == [2 + 4 + 3 + 8]


def test_end_to_end_rows_compare_with_the_first_variant():
    slow, fast = [4.0] * 16 + [10.0] + [4.0] * 7, [2.0] * 16 + [8.0] + [2.0] * 7
    micro_batches = {"slow": slow, "fast": fast}
    evaluations = {"slow": [2.0] * 12, "fast": [1.0] * 12}
    calibrations = {"slow": [], "fast": [3.0, 2.5]}
    first, second = end_to_end.rows_of(micro_batches, evaluations, calibrations, accumulation=25)
    assert first["micro_batch_speedup"]["median"] == 1
    assert "calibration_cost_micro_batches" not in first
    assert second["micro_batch_speedup"]["median"] == second["evaluation_speedup"]["median"] == 2
    assert second["boundary_extra_ms"] == pytest.approx(6000)
    assert second["calibration_cost_micro_batches"] == pytest.approx(0.75)
    assert "iteration_ms" not in second  # none was timed from end to end


# --- what a step consists of


def span(name: str, ms: float, lane: Lane = "compute", kind: str | None = None) -> Span:
    return Span(0, name, kind or name, lane, "forward", 0, 0.0, ms)


def test_parts_of_a_scheduled_pair():
    spans = [
        span("attention before tap", 1, kind="attention"),
        span("attention", 2),
        span("mlp", 4),
        span("shared in", 8),
        span("gate", 16),
        span("decode", 32),
        span("experts", 64),
        span("dispatch", 500, "communication"),
        span("dispatch", 128, "wait"),
    ]
    expected = {"attention": 3, "MLP": 4, "shared expert": 8, REST_OF_LAYER: 48, "experts": 64, EXPOSED: 128}
    assert parts_of(spans) == expected
    assert layer_ms(spans) == 48 + 64 + 128


def test_parts_of_a_layer_of_deepspeed_are_within_its_own_span():
    spans = [
        span("attention", 1),
        span("moe layer", 100),
        span("experts", 40),
        span("shared", 20),
        span("all-to-all", 30, "wait"),
        span("all-to-all", 30, "communication"),
    ]
    expected = {"attention": 1, "MLP": 0, "shared expert": 20, REST_OF_LAYER: 10, "experts": 40, EXPOSED: 30}
    assert parts_of(spans) == expected


# --- tables and figures of a small record

LINK = {"rate_mbit": 250.0, "share": 0.6, "all_to_all_ms": 60.0, "layer_ms": 100.0}
SPREAD = {"median": 1.5, "p10": 1.25, "p90": 1.75}


def bar(name: str, median_ms: float, **more: object) -> dict[str, object]:
    parts = dict(zip(KINDS, (10.0, 20.0, 0.0, 5.0, 30.0, 15.0), strict=True))
    return {"variant": name, "position": None, "median_ms": median_ms, "speedup": SPREAD, "parts_ms": parts, **more}


PLANNED = {
    "schedule": "experts at slot 2",
    "predicted_ms": 81.0,
    "predicted_over_measured": 0.9,
    "communication_ms": 40.0,
    "exposed_ms": {"median": 2.0, "p10": 1.0, "p90": 3.0},
    "hidden_share": 0.95,
    "transfers_processor_ms": 1.5,
    "over_no_communication": {"median": 1.02, "p10": 1.0, "p90": 1.04},
    "hidden_by_waits": {"forward": 0.5},
}
RECORD = {
    "command": "python -m benchmarks.speed.block",
    "environment": {"device": "abacus", "commit": "0"},
    "table": "main",
    "settings": {"rounds": 3, "dispatch": "padded"},
    "links": {"forward": LINK},
    "modes": {"forward": {"rows": [bar(STOCK, 100.0), bar("ScMoE", 90.0, **PLANNED)], "load_max_over_mean": 1.25}},
}


def crossing_record() -> dict[str, object]:
    found = [
        {
            "variant": f"ScMoE Pos-1, {name}",
            "position": "pos1",
            "rate_mbit": rate,
            "median_ms": 100.0,
            "communication_over_window": 100 / rate,
            "over_unchunked": {"median": ratio, "p10": ratio, "p90": ratio},
            "schedule": f"{name} at {rate}",
            "predicted_ms": 10.0 * ratio,
        }
        for rate in (50.0, 100.0)
        for name, ratio in (("unchunked", 1.0), ("2 chunks", 0.9), ("4 chunks", 0.8), ("auto", 0.7))
    ]
    modes = {"train": {"rows": found, "load_max_over_mean": 1.0}}
    return RECORD | {"table": "crossing", "links": {}, "modes": modes}


def test_markdown_of_the_main_table():
    text = tables.markdown(RECORD, "two blocks")
    assert text.startswith("# two blocks: main table, padded dispatch\n")
    assert "forward 250 Mbit/s, all-to-all 60 of 100 ms of the baseline's MoE layer (60 %)" in text
    assert "Busiest expert: 1.25 × the mean" in text
    assert (
        "| variant | forward ms | speed-up |\n|---|---:|---:|\n| DeepSpeed top-2 | 100 | 1.500 (1.250–1.750) |" in text
    )
    row = "| ScMoE | experts at slot 2 | 81 | 0.90 | 40 | 2.0 | 1.5 | 95 % | 50 % | 1.020 (1.000–1.040) |"
    assert row in text.splitlines()
    assert text.count("DeepSpeed top-2") == 1  # nothing was predicted for it


def test_markdown_of_the_crossing():
    lines = tables.markdown(crossing_record(), "two blocks").splitlines()
    first, second = lines[-2:]
    assert first == (
        "| pos1 | 100 | 1.00 | 100 | 0.900 (0.900–0.900) | 0.800 (0.800–0.800) | 0.700 (0.700–0.700) | "
        "auto at 100.0 | 0.900 / 0.800 |"
    )
    assert second.startswith("| pos1 | 50 | 2.00 |")


def test_markdown_tables_are_rectangular():
    for record in (RECORD, crossing_record()):
        lines = [line for line in tables.markdown(record, "two blocks").splitlines() if line.startswith("|")]
        headers = [number for number, line in enumerate(lines) if line.startswith("|---")]
        for begin, end in zip(headers, [*[each - 1 for each in headers[1:]], len(lines)], strict=True):
            assert {line.count("|") for line in lines[begin - 1 : end]} == {lines[begin].count("|")}


def test_bars_are_as_long_as_the_step():
    figure = bars.stacked(RECORD)
    (axes,) = figure.axes
    of_row = [[patch.get_width() for patch in container] for container in axes.containers]
    # The parts cover 80 ms; the rest is "other".
    assert [widths[0] for widths in of_row] == [10, 20, 0, 5, 30, 15, 20]
    assert [sum(widths) for widths in zip(*of_row, strict=True)] == [100, 90]
    assert [text.get_text() for text in axes.get_yticklabels()] == [STOCK, "ScMoE"]


def test_parts_longer_than_the_median_step_leave_no_other():
    assert bars.heights(bar("recorded steps were slower", 70.0))[bars.OTHER] == 0


def test_crossing_draws_a_line_per_way_to_cut():
    drawn = bars.crossing(crossing_record())
    assert [text.get_text() for text in drawn.legends[0].get_texts()] == ["unchunked", "2 chunks", "4 chunks", "auto"]
    assert [axes.get_title("left") for axes in drawn.axes] == ["Pos-1, training step"]


def test_slots_draw_every_slot_and_the_choice():
    found = [
        bar(STOCK, 100.0),
        *(bar(f"ScMoE Pos-1, {name}", 90.0) | {"position": "pos1"} for name in ("slot 1", "slot 2", "slot 3", "auto")),
    ]
    record = RECORD | {"table": "slots", "modes": {"forward": {"rows": found, "load_max_over_mean": 1.0}}}
    drawn = bars.slots(record)
    assert [list(axes.get_xticks()) for axes in drawn.axes] == [[1, 2, 3]]
    assert {text.get_text() for text in drawn.legends[0].get_texts()} == {"auto", "one chunk"}


def test_every_figure_of_the_results_has_a_record_that_draws_it():
    results = Path(redraw.__file__).parent / "results"
    drawn = {"analysis_feasibility.png"}  # from two records, by scmoe analyze feasibility
    for path in results.glob("*.json"):
        record = json.loads(path.read_text())
        if isinstance(record, dict) and "spans" in record:
            drawn |= {f"{path.stem}_{kind}.png" for kind in record["spans"]}
        elif redraw.drawing(record) is not None and path.with_suffix(".png").exists():
            drawn.add(f"{path.stem}.png")
    assert {path.name for path in results.glob("*.png")} == drawn


def test_redraw(tmp_path):
    (tmp_path / "bars.json").write_text(json.dumps(RECORD | {"table": "main"}))
    assert redraw.redraw(tmp_path / "bars.json") == [tmp_path / "bars.png"]
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "times.json").write_text("[]")
    assert redraw.redraw(tmp_path / "times.json") == []


# --- the cost of hooks


@pytest.mark.slow
def test_the_models_that_the_cost_of_hooks_is_taken_from_compute_the_same():
    """`measure` raises otherwise; both sizes, both modes, and for each the replaced model and the A/A pair."""
    settings = {
        "hidden_size": 64,
        "tokens": 16,
        "num_experts": 2,
        "pairs": 2,
        "positions": ["pos1", "pos3"],
        "rounds": 1,
        "clock": "wall",
    }
    found = replace.measure(settings)
    assert len(found) == 2 * 2 * 2 * 2
    assert {row["variant"] for row in found} == {replace.REPLACED, replace.AGAIN}


def test_models_that_differ_are_not_compared():
    config = ScMoEConfig.from_deepspeed({"scmoe": {"merge": "cg2", "use_rts": False}})
    shape = GPTSettings(2, 16, 2, 64, 8)
    replaced = replace.Replaced(shape, config, 2)
    direct = replace.Direct(shape, config, 2, replaced)
    hidden = torch.randn(1, 8, 16)
    replace.require_same(direct, replaced, hidden)
    replaced.layers[0].mlp.input.weight.data.mul_(1.5)
    with pytest.raises(RuntimeError, match="differs by"):
        replace.require_same(direct, replaced, hidden)

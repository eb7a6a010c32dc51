"""Prefill of a vision-language model on two nodes: low precision on overloaded ranks, end to end.

    python -m benchmarks.serving.vision_language --share 0.6 --output benchmarks/results

The prompts are those of examples/vision_language.py with larger images: eight digits of 16 patches and a question. The
model is wider than the example's, with weights that are not trained: times do not depend on them. Gates prefer their
first expert as benchmarks.quality.low_precision's do. A row is a whole model in `Passes.prefill`: patches, embeddings,
blocks, key/value cache, logits of the next token. All rows of a skew alternate within rounds, under the schedules of
the first one; a speed-up is the median of the ratios within rounds.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.harness import tables
from benchmarks.harness.link import find_forward_rate
from benchmarks.harness.on_nodes import on_nodes, parse, write
from benchmarks.harness.skewed_gates import count_loads, first_expert, over_ranks, skew_gates
from benchmarks.harness.variants import Shape
from scmoe_ds.comm.transport import METHODS, Transport
from scmoe_ds.config.overlap_section import OverlapConfig
from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.data.digit_questions import IMAGE_SIZE, PATCH_TOKEN, VOCAB_SIZE, DigitQuestions
from scmoe_ds.inference.low_precision import use_low_precision
from scmoe_ds.inference.model import serving_config
from scmoe_ds.inference.passes import Passes
from scmoe_ds.models.initialization import initialize_parameters
from scmoe_ds.models.vision_language import VisionLanguageGPT
from scmoe_ds.models.vision_language_settings import VisionLanguageSettings
from scmoe_ds.moe.decisions.low_precision import LowPrecision
from scmoe_ds.parallel.agreement import gather
from scmoe_ds.planner.calibrator import Calibrator
from scmoe_ds.planner.rounds import Spread, interleave
from scmoe_ds.planner.rounds import over_ranks as slowest

IMAGES = 8
SETTINGS = VisionLanguageSettings(
    num_layers=4,
    hidden_size=512,
    num_attention_heads=8,
    vocab_size=VOCAB_SIZE,
    max_position_embeddings=160,
    patch_token=PATCH_TOKEN,
    image_size=IMAGE_SIZE,
    patch_size=2,
)
SHAPE = Shape("512 wide, four experts per rank", 512, 8, 16, IMAGES * SETTINGS.patches + len("read? "), 8, 2.0)
ROWS: dict[str, LowPrecision | None] = {
    "off": None,
    "off again (A/A)": None,
    "ReaLB": LowPrecision("hot", score=None),
    "low precision everywhere": LowPrecision("all", score=None),
}
WARM_UP = 8  # passes, in which schedules are timed and chosen


class Server:
    """One row's model on this rank, and its prefill.

    Args:
        like: the server of another row, whose gates it gets; None: its own are skewed.
    """

    def __init__(self, skew: float, low_precision: LowPrecision | None, method: str, like: Server | None) -> None:
        section = {"num_experts": SHAPE.num_experts, "expert_parallel_size": dist.get_world_size()}
        config = serving_config(ScMoEConfig.from_deepspeed({"scmoe": section}), dist.get_world_size())
        self.model = VisionLanguageGPT(SETTINGS, config).eval().requires_grad_(False)
        initialize_parameters(self.model, 1, SETTINGS.init_method_std, SETTINGS.num_layers)
        for pair in self.model.scheduled_pairs():
            pair.layer.set_deepspeed_parallelism()
            pair.layer.transport = Transport(pair.layer.transport.group, method)
        questions = DigitQuestions(SHAPE.sequences, SETTINGS.patches, seed=1 + dist.get_rank(), images=IMAGES)
        asked = [questions.question(number) for number in range(SHAPE.sequences)]
        self._prompts = [question.prompt for question in asked]
        self._images = torch.cat([question.images for question in asked])
        overlap = OverlapConfig(num_chunks=1)
        self.calibrator = Calibrator(self.model.scheduled_pairs(), overlap, torch.device("cpu"), "prefill")
        self._plain = Passes(self.model, {}, None, "")
        self._timed = Passes(self.model, {"prefill": self.calibrator}, None, "")
        if like is not None:
            self.model.load_state_dict(like.model.state_dict())
        elif skew > 1:
            skew_gates(self.model.scheduled_pairs(), self.step, first_expert(skew, SHAPE.num_experts))
        attached = None if low_precision is None else use_low_precision(self.model, low_precision)
        self.used = [] if attached is None else attached.layers

    @torch.inference_mode()
    def step(self, passes: Passes | None = None) -> None:
        """A prefill of all prompts."""
        passes = passes or self._plain
        cache = passes.cache_for(len(self._prompts), SHAPE.seq_length + 1)
        cache.begin(len(self._prompts))
        with cache.attached():
            passes.prefill(self._prompts, cache, False, self._images)

    def schedule(self) -> list[Any]:
        """The schedules that the package chooses. Collective."""
        for _ in range(WARM_UP):
            dist.barrier()
            self.step(self._timed)
        return [pair.schedule for pair in self.model.scheduled_pairs()]

    def follow(self, schedules: list[Any]) -> None:
        """Runs under another row's schedules."""
        for pair, schedule in zip(self.model.scheduled_pairs(), schedules, strict=True):
            pair.schedule, pair.forward_schedule = schedule, None


def table_of(skew: float, settings: dict[str, Any]) -> dict[str, Any]:
    """All rows at one skew. Collective."""
    off = Server(skew, ROWS["off"], settings["method"], None)
    others = {name: Server(skew, row, settings["method"], off) for name, row in ROWS.items() if name != "off"}
    servers = {"off": off, **others}
    off.schedule()
    schedules = [pair.forward_schedule or pair.schedule for pair in off.model.scheduled_pairs()]
    for server in servers.values():
        server.follow(schedules)
    steps = {name: server.step for name, server in servers.items()}
    times = {name: slowest(own) for name, own in interleave(steps, settings["rounds"], 2, dist.barrier).items()}
    loads = count_loads(off.model, off.step, LowPrecision(score=None))
    hot = gather([each.counts.hot / each.counts.passes for each in servers["ReaLB"].used])
    found = [
        {
            "row": name,
            "median_ms": 1e3 * statistics.median(values),
            "speedup": vars(Spread.of_ratios(times["off"], values)),
        }
        for name, values in times.items()
    ]
    ranks = [over_ranks(each, dist.get_world_size()) for each in loads]
    return {"rows": found, "ranks": ranks, "hot": hot, "slots": [schedule.slots for schedule in schedules]}


def rank_main(settings: dict[str, Any]) -> dict[str, Any]:
    """The record; each of the two processes runs it."""
    link = find_forward_rate(SHAPE, settings["share"], settings["method"])
    return {"link": vars(link), "skews": {str(skew): table_of(skew, settings) for skew in settings["skews"]}}


def markdown(record: dict[str, Any]) -> str:
    """The record as tables."""
    settings, link = record["settings"], record["link"]
    share = f"{100 * IMAGES * SETTINGS.patches / SHAPE.seq_length:.0f} %"
    lines = [
        f"# Prefill of images and text on two nodes, all-to-all {100 * settings['share']:.0f} % of a top-2 layer",
        "",
        *tables.head(record),
        f"{SHAPE.name}, {SETTINGS.num_layers} layers; {SHAPE.sequences} prompts of {SHAPE.seq_length} tokens per rank, "
        f"{share} of them patches; fp32, int8 where low. Link {link['rate_mbit']:.0f} Mbit/s. {settings['rounds']} "
        "interleaved rounds; speed-up over the first row: median (10th–90th percentile) of the ratios within rounds.",
        "",
    ]
    for skew, found in record["skews"].items():
        of_ranks = zip(*(each["load"] for each in found["ranks"]), strict=True)
        loads = " and ".join(f"{sum(each) / len(each):.2f}" for each in of_ranks)
        hot = " and ".join(f"{100 * sum(each) / len(each):.0f} %" for each in found["hot"])
        cells = [[row["row"], f"{row['median_ms']:.0f}", str(Spread(**row["speedup"]))] for row in found["rows"]]
        lines += [
            f"## first expert {float(skew):g} ×" if float(skew) > 1 else "## gate as it starts",
            "",
            f"The two ranks have {loads} × the mean load. ReaLB: they are hot in {hot} of the layer passes.",
            "",
            *tables.table(["row", "ms", "speed-up"], cells),
            "",
        ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=0.6, help="all-to-all share of the top-2 MoE layer")
    parser.add_argument("--skews", type=float, nargs="+", default=[1.0, 1.8, 4.0], help="1: the gate as it starts")
    parser.add_argument("--method", choices=METHODS, default="send_receive", help="all-to-all of all rows")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--output", type=Path, help="directory for JSON and table")
    args, settings = parse(parser, rank_main)
    record = on_nodes("benchmarks.serving.vision_language", settings)
    text = markdown(record)
    print(text)
    if args.output:
        write(args.output, f"vision_language_{round(100 * args.share)}", record, text)


if __name__ == "__main__":
    main()

"""Loads the trained model that a program's flags name, with what they decide about its routed experts."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, replace
from itertools import combinations

import torch.distributed as dist

from scmoe_ds.errors import ArgumentError
from scmoe_ds.inference import attachment
from scmoe_ds.inference.copies import Copies, copy_experts, read_loads
from scmoe_ds.inference.dropping import Dropped, Dropping, drop_experts
from scmoe_ds.inference.load import Loaded, load_trained
from scmoe_ds.inference.low_precision import Attached, use_low_precision
from scmoe_ds.inference.offload import Offloading
from scmoe_ds.moe.decisions.low_precision import LowPrecision
from scmoe_ds.offload.store import ExpertStore, StoreCounts
from scmoe_ds.parallel.agreement import from_rank_zero, run_on_rank_zero, run_together
from scmoe_ds.parallel.groups import Layout
from scmoe_ds.parallel.process import device
from scmoe_ds.programs.flags.checks import check_output_file, check_ranges, flag_of, require_same_flags
from scmoe_ds.programs.flags.tokenizer import named_tokenizer


def check_flags(args: argparse.Namespace) -> None:
    """Raises an ArgumentError for flags of `add_trained_model` that are out of range, that do not go together or that
    this machine cannot serve."""
    check_ranges(args)
    for name in ("expert_cache", "expert_tier"):
        if args.experts == "resident" and getattr(args, name) is not None:
            raise ArgumentError(
                f"{flag_of(name)} goes with --experts offload or offload-async: resident experts are all on the device"
            )
    if args.expert_tier == "host" and device().type != "cuda":
        raise ArgumentError("--expert-tier host: is memory beside a GPU, and there is none here; leave the flag out")
    dropping = [flag_of(name) for name in ("drop_rate", "drop_method", "drop_load_aware") if getattr(args, name)]
    if args.no_drop and dropping:
        raise ArgumentError(f"--no-drop computes all: remove it, or {dropping[0]}")
    if args.expert_loads is not None and not args.expert_copies:
        raise ArgumentError("--expert-loads goes with --expert-copies: say how many copies a rank shall keep")
    drops = replace(attachment.DROPS, without=f"leave {' and '.join(dropping)} out")
    asked = {
        " and ".join(dropping): (drops, bool(dropping)),
        f"--drop-method {args.drop_method}": (attachment.HALVES, args.drop_method == "2t"),
        f"--low-precision {args.low_precision}": (attachment.LOW_PRECISION, args.low_precision != "off"),
        f"--expert-copies {args.expert_copies}": (attachment.COPIES, args.expert_copies),
        "--save-expert-loads": (attachment.LOADS, args.save_expert_loads is not None and not args.expert_copies),
        f"--experts {args.experts}": (attachment.OFFLOADED, args.experts != "resident"),
    }
    for (flag, (own, wanted)), (_, (other, too)) in combinations(asked.items(), 2):
        if wanted and too:
            attachment.check_together(own, other, flag)
    if args.low_precision == "hot" and args.moe_expert_parallel_size == 1:
        raise ArgumentError(
            "--low-precision hot: a rank with all experts is never overloaded; give --moe-expert-parallel-size, or "
            "use all"
        )


def load(args: argparse.Namespace) -> tuple[Loaded, Decisions]:
    """What the flags of `add_trained_model` name, and what they decide about its routed experts. Collective.

    Raises:
        ArgumentError, CheckpointError, DataError, ScMoEConfigError: what a user can correct.
    """
    require_same_flags(args)
    if args.save_expert_loads is not None:  # rank 0 alone writes it, maybe where no other machine can
        run_on_rank_zero(lambda: check_output_file("--save-expert-loads", args.save_expert_loads))
    resident = args.experts == "resident"
    loaded = load_trained(
        args.load,
        dtype=args.dtype,
        tokenizer=run_together(lambda: named_tokenizer(args)),
        layout=Layout(
            dist.get_world_size(),
            args.tensor_model_parallel_size,
            args.moe_expert_parallel_size,
            args.enable_expert_tensor_parallelism,
        ),
        offloading=None if resident else Offloading(args.experts, args.expert_cache, args.expert_tier),
    )
    # Copies come last: they are of experts as all else has left them.
    return loaded, Decisions(loaded.store, _drops(args, loaded), _low_precision(args, loaded), _copies(args, loaded))


@dataclass(frozen=True)
class Decisions:
    """About the routed experts of a loaded model; None: nothing is decided.

    Attributes:
        store: experts are offloaded to it.
        drops: routed experts are left out.
        low_precision: overloaded ranks compute in it.
        copies: rows go to copies of hot experts, or their loads are counted.
    """

    store: ExpertStore | None
    drops: Dropped | None
    low_precision: Attached | None
    copies: Copies | None

    def told(self) -> list[str]:
        """A line of what each has done since the model was loaded. Collective."""
        lines = [] if self.store is None else [_migrations(self.store.counts)]
        lines += [] if self.low_precision is None else [self.low_precision.summary()]
        lines += [] if self.drops is None else [str(self.drops.shares())]
        return lines + ([] if self.copies is None or not self.copies.per_rank else [self.copies.summary()])

    def save(self, args: argparse.Namespace) -> None:
        """Writes the loads of experts where --save-expert-loads asks for them. Collective."""
        copies, path = self.copies, args.save_expert_loads
        if copies is not None and path is not None:
            run_on_rank_zero(lambda: copies.save(path))
            if dist.get_rank() == 0:
                print(f"wrote {path}: --expert-copies N --expert-loads {path} chooses copies by it", file=sys.stderr)


def _migrations(counts: StoreCounts) -> str:
    return (
        f"experts: {counts.used} computed, {counts.migrations} migrated ({counts.migrated_bytes / 1e9:.2f} GB), "
        f"{counts.hits} found on the device, {counts.waited_s:.2f} s waited for"
    )


def _drops(args: argparse.Namespace, loaded: Loaded) -> Dropped | None:
    if args.no_drop:
        return None
    asked = Dropping(args.drop_rate, args.drop_method, args.drop_load_aware)
    found = drop_experts(loaded, None if asked == Dropping() else asked)
    if found is not None and dist.get_rank() == 0:
        print(f"{found} (--no-drop computes all)", file=sys.stderr)
    return found


def _low_precision(args: argparse.Namespace, loaded: Loaded) -> Attached | None:
    if args.low_precision == "off":
        return None
    bounds = args.low_precision_score, args.low_precision_share
    settings = LowPrecision(args.low_precision, *bounds, min_tokens=args.low_precision_min_tokens)
    return run_together(lambda: use_low_precision(loaded.model, settings))


def _copies(args: argparse.Namespace, loaded: Loaded) -> Copies | None:
    if not args.expert_copies and args.save_expert_loads is None:
        return None
    loads = None if args.expert_loads is None else from_rank_zero(lambda: read_loads(args.expert_loads))
    return copy_experts(loaded.model, args.expert_copies, loads)

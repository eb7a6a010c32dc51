"""Flags of the programs that load a trained model."""

from __future__ import annotations

import argparse

from scmoe_ds.programs.flags.tokenizer import add_tokenizer

DTYPES = ("bf16", "fp16", "fp32")


def add_trained_model(parser: argparse.ArgumentParser) -> None:
    """Flags that name a trained model, and say what is decided about its routed experts."""
    for add in (_add_model, _add_experts, _add_low_precision, _add_dropping, _add_copies):
        add(parser)


def _add_model(parser: argparse.ArgumentParser) -> None:
    """Flags that name a trained model, its tokenizer and its layout."""
    group = parser.add_argument_group("model and tokenizer")
    group.add_argument(
        "--load",
        required=True,
        help="a checkpoint of pretrain_gpt_scmoe.py, a directory of them (its latest), or an export of scmoe convert",
    )
    group.add_argument("--dtype", choices=DTYPES, help="default: as it was trained or exported")
    add_tokenizer(group, "the one that the checkpoint records; ByteTokenizer where it records none")
    group = parser.add_argument_group("ranks", "started with the deepspeed launcher; alone, a process is all ranks")
    group.add_argument("--moe-expert-parallel-size", type=int, default=1, help="ranks that share one set of experts")
    group.add_argument("--tensor-model-parallel-size", type=int, default=1, help="ranks that share a layer")
    group.add_argument(
        "--enable-expert-tensor-parallelism", action="store_true", help="divide each expert over these ranks"
    )
    group.add_argument(
        "--distributed-timeout-minutes", type=float, default=10.0, help="end the job when a collective takes longer"
    )
    group.add_argument("--local_rank", "--local-rank", type=int, default=-1, help="set by the launcher")


def _add_copies(parser: argparse.ArgumentParser) -> None:
    """Flags that copy hot experts to other ranks."""
    group = parser.add_argument_group("hot experts", "copies of them take rows from the rank that would have too many")
    group.add_argument(
        "--expert-copies",
        type=int,
        default=0,
        help="copies of other ranks' experts that each rank keeps in each MoE layer. They are chosen by the loads of "
        "the first passes; how rows divide is decided in every step",
    )
    group.add_argument(
        "--expert-loads", help="a file of --save-expert-loads: copies are chosen by it before the first pass"
    )
    group.add_argument("--save-expert-loads", help="a file for the rows that each expert got in this run")


def _add_experts(parser: argparse.ArgumentParser) -> None:
    """Flags that keep routed experts out of the device's memory."""
    group = parser.add_argument_group("experts", "where the routed experts live")
    group.add_argument(
        "--experts",
        choices=["resident", "offload", "offload-async"],
        default="resident",
        help="resident: on the device; offload: fetched "
        "when they are computed; offload-async: fetched as soon as the gate has chosen, while the "
        "backbone computes. They come from pinned host memory to a GPU, from the files of an export "
        "otherwise",
    )
    group.add_argument(
        "--expert-cache",
        help="experts that are kept on the device: a number, or a size such as 2GB, "
        "of all layers together; at most those that the model has on a rank. Default: twice the experts "
        "of a token",
    )
    group.add_argument(
        "--expert-tier",
        choices=["host", "disk"],
        help="where offloaded experts are kept; default: host beside a GPU, else disk",
    )


def _add_low_precision(parser: argparse.ArgumentParser) -> None:
    """Flags by which overloaded ranks compute their routed experts in low precision."""
    group = parser.add_argument_group("low precision", "of routed experts: int8 on CPUs and A800s, fp8 on H100s")
    group.add_argument(
        "--low-precision",
        choices=["off", "hot", "all"],
        default="off",
        help="hot: overloaded ranks whose rows mostly tolerate it; all: every rank, to compare",
    )
    group.add_argument(
        "--low-precision-score",
        type=float,
        default=0.7,
        help="a row tolerates it if its gate score is lower; raise it if ranks are rarely hot",
    )
    group.add_argument(
        "--low-precision-share",
        type=float,
        default=0.7,
        help="share of such rows from which a rank may be hot; raise it if the quality suffers",
    )
    group.add_argument(
        "--low-precision-min-tokens",
        type=int,
        default=2048,
        help="off unless a batch of all ranks has more; lower it where smaller batches are slow, too",
    )


def _add_dropping(parser: argparse.ArgumentParser) -> None:
    """Flags by which routed experts that hardly matter are left out."""
    group = parser.add_argument_group(
        "sparsity", "leave out routed experts that hardly matter for a token; scmoe sparsify writes the thresholds"
    )
    group.add_argument(
        "--drop-rate",
        type=float,
        help="share of the routed experts' computation to leave out, above 0 and below 1. Default: the rate that "
        "sparsity.json beside the weights names, or nothing",
    )
    group.add_argument(
        "--drop-method",
        choices=["1t", "2t"],
        help="1t skips; 2t also computes with half of an expert. Default: 2t where scmoe sparsify has sorted neurons",
    )
    group.add_argument(
        "--drop-load-aware",
        action="store_true",
        help="expert-parallel ranks with less to do drop less: quality is kept where no time is lost",
    )
    group.add_argument("--no-drop", action="store_true", help="compute all, whatever sparsity.json names")

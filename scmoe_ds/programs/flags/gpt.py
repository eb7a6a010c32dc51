"""Command line: Megatron-DeepSpeed's flag names, and how they meet the DeepSpeed JSON.

Model and data come from flags. Batch, optimizer, learning-rate schedule, precision and ZeRO come from the JSON. The MoE
can be set in either; a flag and the JSON that disagree are an error that names both.
"""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.errors import ArgumentError
from scmoe_ds.models.layers import GPTSettings
from scmoe_ds.models.presets import PRESETS
from scmoe_ds.models.recompute import GRANULARITIES
from scmoe_ds.programs.flags import megatron as megatron_flags
from scmoe_ds.programs.flags.checks import (
    check_lowest,
    check_positive,
    check_rates,
    check_training,
    require_flags,
)
from scmoe_ds.programs.flags.data import add_data, resolve_data_flags
from scmoe_ds.programs.flags.parser import FlagParser
from scmoe_ds.programs.flags.to_json import MLP_TYPES, merge_schedule, read_json, read_section, set_length
from scmoe_ds.programs.flags.tokenizer import set_tokenizer_type

logger = logging.getLogger("scmoe_ds")


def build_parser() -> argparse.ArgumentParser:
    """The parser of pretrain_gpt_scmoe.py; a preset, if one is named, has to be applied as defaults afterwards."""
    parser = FlagParser(
        prog="pretrain_gpt_scmoe.py",
        description="Pretrain a GPT with ScMoE layers under DeepSpeed.",
        epilog="Batch size, optimizer, learning-rate schedule, precision and ZeRO are set in the DeepSpeed JSON. "
        "Megatron-DeepSpeed's flags for them are taken too: docs/from_megatron_deepspeed.md lists all of its flags.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        elsewhere=megatron_flags.REFUSED,
    )
    for add in (_add_network, add_data, add_training, add_moe, add_deepspeed, megatron_flags.add_megatron_flags):
        add(parser)
    return parser


def _add_network(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("network size")
    group.add_argument("--preset", choices=sorted(PRESETS), help="sizes of one of the paper's models; flags override")
    group.add_argument("--num-layers", type=int, help="Transformer blocks")
    group.add_argument("--hidden-size", type=int, help="width of the residual stream")
    group.add_argument("--ffn-hidden-size", type=int, default=0, help="0: 4 * hidden, or 8/3 with --swiglu")
    group.add_argument("--num-attention-heads", type=int, help="query heads")
    group.add_argument("--num-key-value-heads", type=int, default=0, help="0: as many as query heads")
    group.add_argument("--seq-length", type=int, help="tokens per training sequence")
    group.add_argument("--max-position-embeddings", type=int, help="default: --seq-length")
    group.add_argument("--position-embedding-type", choices=["learned_absolute", "rope"], default="learned_absolute")
    group.add_argument("--rotary-base", type=float, default=10000.0, help="base of rotary frequencies")
    group.add_argument("--normalization", type=_norm, choices=["LayerNorm", "RMSNorm"], default="LayerNorm")
    group.add_argument("--layernorm-epsilon", type=float, default=1e-5, help="epsilon of the norms")
    group.add_argument(
        "--norm-placement",
        choices=["pre", "post"],
        default="pre",
        help="norm before each sub-layer, "
        "or behind its residual sum; post: to see what a shortcut makes of such a model",
    )
    group.add_argument(
        "--residual-scale",
        type=float,
        default=1.0,
        help="factor on each sub-layer's output before it "
        "is added (Granite's residual_multiplier, 1 / DeepNorm's alpha)",
    )
    group.add_argument("--swiglu", action="store_true", help="SwiGLU instead of GELU")
    group.add_argument("--disable-bias-linear", action="store_true", help="no biases in linear layers")
    group.add_argument("--untie-embeddings-and-output-weights", action="store_true", help="a head of its own")
    group.add_argument("--make-vocab-size-divisible-by", type=int, default=128, help="padding of the vocabulary")
    group.add_argument("--attention-dropout", type=float, default=0.1, help="dropout of attention weights")
    group.add_argument("--hidden-dropout", type=float, default=0.1, help="dropout on the residual branches")
    group.add_argument("--init-method-std", type=float, default=0.02, help="standard deviation of initial weights")


def add_training(parser: argparse.ArgumentParser) -> None:
    """Flags of the training loop."""
    group = parser.add_argument_group("training, validation and checkpoints")
    group.add_argument("--train-iters", type=int, help="optimizer steps of the whole run, over all resumes")
    group.add_argument("--exit-duration-in-mins", type=float, help="save and stop after this many minutes")
    group.add_argument("--exit-interval", type=int, help="save and stop at an iteration that this divides")
    group.add_argument("--log-interval", type=int, default=100, help="iterations per log line")
    group.add_argument(
        "--log-gating-interval",
        type=int,
        help="iterations between the gates' choices (paper figure 9) that go to DeepSpeed's monitors; default: never",
    )
    group.add_argument("--eval-interval", type=int, default=1000, help="iterations per validation")
    group.add_argument("--eval-iters", type=int, default=100, help="batches per validation; 0: no validation")
    group.add_argument("--save", help="directory of checkpoints; default: none are written")
    group.add_argument("--save-interval", type=int, help="iterations per checkpoint; one is always saved at the end")
    group.add_argument("--keep-last", type=int, help="checkpoints that --save keeps; default: all")
    group.add_argument(
        "--load",
        help="directory of checkpoints to resume from (its latest), one checkpoint, or exported weights to start with",
    )
    group.add_argument(
        "--auto-resume",
        action="store_true",
        help="resume from the newest whole checkpoint in --save; if none, from --load",
    )
    group.add_argument(
        "--recompute-granularity",
        choices=GRANULARITIES,
        help="activation checkpointing: keep the "
        "input of each run of blocks (full) or of each dense operator (selective)",
    )
    group.add_argument("--tensor-model-parallel-size", type=int, default=1, help="ranks that share a layer")


def add_moe(parser: argparse.ArgumentParser) -> None:
    """Flags that set fields of the "scmoe" section."""
    group = parser.add_argument_group("mixture of experts", 'set fields of the JSON\'s "scmoe" section')
    group.add_argument("--num-experts", type=int, nargs="+", help="one number, or one per MoE layer")
    group.add_argument("--topk", type=int, help="routed experts per token")
    group.add_argument("--mlp-type", choices=sorted(MLP_TYPES), help="standard: topk; residual: shared_expert")
    group.add_argument("--expert-interval", type=int, help="an MoE in every n-th block")
    group.add_argument("--moe-expert-parallel-size", type=int, help="ranks that share one set of experts")
    group.add_argument("--moe-train-capacity-factor", type=float, help="capacity in training")
    group.add_argument("--moe-eval-capacity-factor", type=float, help="capacity in evaluation")
    group.add_argument("--moe-min-capacity", type=int, help="least capacity of an expert")
    group.add_argument("--moe-loss-coeff", type=float, help="weight of the load-balancing loss")
    group.add_argument(
        "--disable-moe-token-dropping",
        dest="moe_token_dropping",
        action="store_const",
        const=False,
        help="every token reaches its experts",
    )
    group.add_argument(
        "--disable-moe-top2-2nd-expert-sampling",
        dest="moe_top2_2nd_expert_sampling",
        action="store_const",
        const=False,
        help="no random choice of the second expert",
    )
    group.add_argument("--enable-expert-tensor-parallelism", action="store_const", const=True)
    group.add_argument("--scmoe-position", choices=["pos1", "pos2", "pos3"], help="where the shortcut is taken")
    group.add_argument("--scmoe-merge", choices=["add", "cg1", "cg2"], help="how shared and routed output meet")
    group.add_argument(
        "--scmoe-trace", type=int, metavar="N", help="draw iteration N: a trace for Perfetto and a figure"
    )
    group.add_argument("--scmoe-trace-dir", default="traces", help="directory for them")
    group.add_argument("--scmoe-expert-slot", type=_slot, help='"auto" or the operator before which experts run')


def add_deepspeed(parser: argparse.ArgumentParser) -> None:
    """DeepSpeed's own flags."""
    group = parser.add_argument_group("DeepSpeed")
    group.add_argument(
        "--distributed-timeout-minutes",
        type=float,
        default=10.0,
        help="end the job when a collective of any process group takes longer",
    )
    group.add_argument("--deepspeed", action="store_true", help="accepted for habit; DeepSpeed is always on")
    group.add_argument("--deepspeed_config", "--deepspeed-config", help="the DeepSpeed JSON")
    group.add_argument("--local_rank", "--local-rank", type=int, default=-1, help="set by the launcher")


def _norm(text: str) -> str:
    return {"layernorm": "LayerNorm", "rmsnorm": "RMSNorm"}.get(
        text.lower(), text
    )  # Megatron-DeepSpeed's are lower case


def _slot(text: str) -> int | str:
    if text != "auto" and not text.lstrip("-").isdecimal():
        raise argparse.ArgumentTypeError(f'{text} must be a number or "auto"')
    return text if text == "auto" else int(text)


def parse_arguments(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, dict[str, Any], ScMoEConfig]:
    """Flags, the DeepSpeed JSON with the flags merged into its "scmoe" section, and that section.

    Raises:
        ArgumentError, ScMoEConfigError: a setting that its user can mend.
        SystemExit: argparse's own findings (unknown flag, not a number), and --help.
    """
    args = parse_flags(build_parser(), {name: preset.arguments for name, preset in PRESETS.items()}, argv)
    whole = read_json(args)
    set_length(args, whole)
    _check(args)
    merge_schedule(whole, args, args.deepspeed_config)
    config = read_section(args, whole)
    config.check_model(args.num_layers)
    if (line := megatron_flags.without_effect(args)) and os.environ.get("RANK", "0") == "0":
        logger.info(line)
    return args, whole, config


def parse_flags(
    parser: argparse.ArgumentParser, presets: Mapping[str, Mapping[str, Any]], argv: Sequence[str] | None
) -> argparse.Namespace:
    """The flags, over the values of the preset that they name.

    Raises:
        ArgumentError: no --deepspeed_config.
        SystemExit: argparse's own findings.
    """
    args = parser.parse_args(argv)
    if args.preset:
        parser.set_defaults(**presets[args.preset])
        args = parser.parse_args(argv)
    if args.deepspeed_config is None:
        raise ArgumentError("--deepspeed_config is missing: name a JSON, e.g. ds_configs/gpt_small_cpu.json")
    return args


def gpt_settings(args: argparse.Namespace, padded_vocab_size: int) -> GPTSettings:
    """The model's shape.

    Raises:
        ArgumentError: sizes that do not divide.
    """
    try:
        return GPTSettings(
            num_layers=args.num_layers,
            hidden_size=args.hidden_size,
            num_attention_heads=args.num_attention_heads,
            vocab_size=padded_vocab_size,
            max_position_embeddings=args.max_position_embeddings or args.seq_length,
            num_key_value_heads=args.num_key_value_heads,
            ffn_hidden_size=args.ffn_hidden_size,
            normalization=args.normalization,
            swiglu=args.swiglu,
            position_embedding=args.position_embedding_type,
            rotary_base=args.rotary_base,
            add_bias_linear=not args.disable_bias_linear,
            tie_embeddings=not args.untie_embeddings_and_output_weights,
            hidden_dropout=args.hidden_dropout,
            attention_dropout=args.attention_dropout,
            layernorm_epsilon=args.layernorm_epsilon,
            init_method_std=args.init_method_std,
            norm_placement=args.norm_placement,
            residual_scale=args.residual_scale,
        )
    except ValueError as error:
        raise ArgumentError(str(error)) from None


def comparable(args: argparse.Namespace) -> dict[str, Any]:
    """The flags without what rightly differs between ranks."""
    return {name: value for name, value in vars(args).items() if name != "local_rank"}


def _check(args: argparse.Namespace) -> None:
    require_flags(args, ("num_layers", "hidden_size", "num_attention_heads", "seq_length", "train_iters"))
    args.max_position_embeddings = args.max_position_embeddings or args.seq_length
    check_lowest(
        args, 1, ("num_layers", "hidden_size", "num_attention_heads", "seq_length", "make_vocab_size_divisible_by")
    )
    check_lowest(args, 0, ("ffn_hidden_size", "num_key_value_heads"))
    check_training(args)
    set_tokenizer_type(args)
    resolve_data_flags(args)
    if args.seq_length > args.max_position_embeddings:
        raise ArgumentError(
            f"--seq-length {args.seq_length} exceeds --max-position-embeddings "
            f"{args.max_position_embeddings}; leave the latter out"
        )
    check_rates(args, ("attention_dropout", "hidden_dropout"))
    check_positive(args, ("layernorm_epsilon", "rotary_base", "init_method_std"))

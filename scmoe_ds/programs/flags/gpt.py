"""Command line: Megatron-DeepSpeed's flag names, and how they meet the DeepSpeed JSON.

Model and data come from flags. Batch, optimizer, learning-rate schedule, precision and ZeRO come from the JSON. The MoE
can be set in either; a flag and the JSON that disagree are an error that names both.
"""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from scmoe_ds.errors import ArgumentError
from scmoe_ds.models.presets import PRESETS
from scmoe_ds.programs.flags import megatron as megatron_flags
from scmoe_ds.programs.flags.checks import check_ranges, check_training, require_flags
from scmoe_ds.programs.flags.data import add_data, resolve_data_flags
from scmoe_ds.programs.flags.distill import add_distill, check_adapt
from scmoe_ds.programs.flags.megatron_refused import REFUSED
from scmoe_ds.programs.flags.parser import FlagParser, started_as
from scmoe_ds.programs.flags.tokenizer import set_tokenizer_type
from scmoe_ds.programs.flags.training import add_deepspeed, add_moe, add_training, parse_flags

if TYPE_CHECKING:  # torch and DeepSpeed take seconds, and the parser needs neither
    from scmoe_ds.config.loading import LoadedConfig
    from scmoe_ds.models.layers import GPTSettings

logger = logging.getLogger("scmoe_ds")

OFTEN = """
    --deepspeed_config --preset --num-layers --hidden-size --num-attention-heads --seq-length --num-experts --topk
    --mlp-type --scmoe-position --moe-expert-parallel-size --tensor-model-parallel-size --data-path --split
    --tokenizer-model --train-iters --save --save-interval --auto-resume --load --log-interval --log-precise
    --eval-interval --eval-iters
    """.split()


def build_parser() -> FlagParser:
    """The parser of pretrain_gpt_scmoe.py; a preset, if one is named, has to be applied as defaults afterwards."""
    parser = FlagParser(
        prog=started_as("pretrain_gpt_scmoe.py"),
        description="Pretrain a GPT with ScMoE layers. The DeepSpeed JSON has batch size, optimizer, schedule, "
        "precision and ZeRO, or Megatron's flags set them (--micro-batch-size, --lr, --bf16 …).",
        epilog="docs/from_megatron_deepspeed.md lists all flags of Megatron-DeepSpeed, and what becomes of each.",
        elsewhere=REFUSED,
        example="deepspeed --num_accelerators 2 pretrain_gpt_scmoe.py \\\n"
        "      --deepspeed_config ds_configs/gpt_small_cpu.json --num-layers 4 --hidden-size 128 \\\n"
        "      --num-attention-heads 4 --seq-length 256 --train-iters 200",
        often=OFTEN,
    )
    for add in (
        _add_network,
        add_data,
        add_training,
        _add_of_gpt,
        add_moe,
        add_distill,
        add_deepspeed,
        megatron_flags.add_megatron_flags,
    ):
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
        help="pre: a norm before each sub-layer; post: a norm after its residual sum, to try a shortcut in such "
        "a model",
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
    group.add_argument(
        "--untie-embeddings-and-output-weights", action="store_true", help="give the output head its own weights"
    )
    group.add_argument("--make-vocab-size-divisible-by", type=int, default=128, help="padding of the vocabulary")
    group.add_argument("--attention-dropout", type=float, default=0.1, help="dropout of attention weights")
    group.add_argument("--hidden-dropout", type=float, default=0.1, help="dropout on the residual branches")
    group.add_argument("--init-method-std", type=float, default=0.02, help="standard deviation of initial weights")


def _add_of_gpt(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("memory, ranks and gates")
    group.add_argument(
        "--recompute-granularity",
        choices=["full", "selective"],
        help="activation checkpointing: keep the input of each pair of blocks (full) or of each dense operator "
        "(selective)",
    )
    group.add_argument("--tensor-model-parallel-size", type=int, default=1, help="ranks that share a layer")
    group.add_argument(
        "--log-gating-interval",
        type=int,
        help="write the gates' choices (paper figure 9) to DeepSpeed's monitors every N iterations; default: never",
    )


def _norm(text: str) -> str:
    return {"layernorm": "LayerNorm", "rmsnorm": "RMSNorm"}.get(
        text.lower(), text
    )  # Megatron-DeepSpeed's are lower case


def parse_arguments(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, LoadedConfig]:
    """Flags, and the DeepSpeed JSON with the flags merged into it.

    Raises:
        ArgumentError, ScMoEConfigError: a setting that its user can correct.
        SystemExit: argparse's own findings (unknown flag, not a number), and --help.
    """
    from scmoe_ds.programs.flags.to_json import load_merged, merge_schedule, read_json, set_length

    args = parse_flags(build_parser(), {name: preset.arguments for name, preset in PRESETS.items()}, argv)
    whole = read_json(args)
    set_length(args, whole)
    _check(args)
    whole = merge_schedule(whole, args)
    config = load_merged(args, whole)
    config.section.check_model(args.num_layers)
    check_adapt(config.section, args.save)
    if (line := megatron_flags.without_effect(args)) and os.environ.get("RANK", "0") == "0":
        logger.info(line)
    return args, config


def gpt_settings(args: argparse.Namespace, padded_vocab_size: int) -> GPTSettings:
    """The model's shape.

    Raises:
        ArgumentError: sizes that do not divide.
    """
    from scmoe_ds.models.layers import GPTSettings

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


def _check(args: argparse.Namespace) -> None:
    check_shape(args, ("train_iters",))
    check_training(args)
    resolve_data_flags(args)


def check_shape(args: argparse.Namespace, others: Sequence[str] = ()) -> None:
    """Checks the flags that a model is built from, and sets those that they leave open.

    Args:
        others: flags that must be there as well.

    Raises:
        ArgumentError: a flag that is missing, or does not fit another one.
    """
    require_flags(args, ("num_layers", "hidden_size", "num_attention_heads", "seq_length", *others))
    check_ranges(args)
    set_tokenizer_type(args)
    args.max_position_embeddings = args.max_position_embeddings or args.seq_length
    if args.seq_length > args.max_position_embeddings:
        raise ArgumentError(
            f"--seq-length {args.seq_length} exceeds --max-position-embeddings "
            f"{args.max_position_embeddings}; leave the latter out"
        )

"""Command line of scmoe pretrain-swin: the flags of pretrain_gpt_scmoe.py, with images in the place of text."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from scmoe_ds.errors import ArgumentError
from scmoe_ds.models.swin_settings import STAGES, SWIN_PRESETS, SwinSettings
from scmoe_ds.programs.flags.checks import check_training, require_flags
from scmoe_ds.programs.flags.megatron import add_json_flags
from scmoe_ds.programs.flags.parser import FlagParser
from scmoe_ds.programs.flags.training import add_deepspeed, add_moe, add_training, parse_flags

if TYPE_CHECKING:
    from scmoe_ds.config.loading import LoadedConfig

SIZES = ("img_size", "window_size", "embed_dim", "depths", "num_heads")


def build_parser() -> FlagParser:
    """The parser; a preset, if one is named, has to be applied as defaults afterwards."""
    parser = FlagParser(
        prog="scmoe pretrain-swin",
        description="Train a SwinV2-MoE image classifier with ScMoE layers under DeepSpeed.",
        example="deepspeed --num_accelerators 1 --module scmoe_ds.programs.pretrain_swin --preset swin-digits \\\n"
        "      --deepspeed_config ds_configs/swin_digits_cpu.json --train-iters 200",
        often="""--deepspeed_config --preset --dataset --data-path --split --num-classes --num-experts --topk --mlp-type
            --scmoe-position --moe-expert-parallel-size --train-iters --save --save-interval --auto-resume --load
            --log-interval --log-precise --eval-interval --eval-iters --seed""".split(),
        epilog="Batch size, optimizer, learning-rate schedule, precision and ZeRO are set in the DeepSpeed JSON.",
    )
    group = parser.add_argument_group("network size")
    group.add_argument("--preset", choices=sorted(SWIN_PRESETS), help="sizes of a known model; flags override")
    group.add_argument("--img-size", type=int, help="pixels a side")
    group.add_argument("--patch-dim", type=int, default=4, help="pixels a side of a patch, which becomes a token")
    group.add_argument("--window-size", type=int, help="tokens a side of an attention window")
    group.add_argument("--embed-dim", type=int, help="width of stage 1; doubles with every stage")
    group.add_argument("--depths", type=int, nargs=STAGES, help="blocks per stage")
    group.add_argument("--num-heads", type=int, nargs=STAGES, help="attention heads per stage")
    group.add_argument("--num-classes", type=int, default=1000, help="classes of the head")
    group.add_argument("--num-channels", type=int, default=3, help="1: grey, 3: colours")
    group.add_argument("--drop-path-rate", type=float, default=0.1, help="stochastic depth of the last block")
    group.add_argument("--hidden-dropout", type=float, default=0.0, help="dropout behind each MLP")
    group.add_argument("--attention-dropout", type=float, default=0.0, help="dropout of attention weights")
    group.add_argument("--init-method-std", type=float, default=0.02, help="standard deviation of initial weights")
    images = parser.add_argument_group("images")
    images.add_argument("--dataset", choices=["folder", "digits"], default="folder", help="digits: scikit-learn's")
    images.add_argument("--data-path", help="directory of <class>/<image>, or of train/ and val/ that hold such")
    images.add_argument(
        "--split", default="80,20", help="training and validation shares, drawn by --seed; 100,0: no validation"
    )
    images.add_argument("--num-workers", type=int, default=0, help="data loader processes per rank")
    images.add_argument(
        "--seed", type=int, default=1234, help="seed of split, weights, data order, dropout and gate noise"
    )
    for add in (add_training, add_moe, add_deepspeed, add_json_flags):
        add(parser)
    return parser


def parse_image_arguments(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, LoadedConfig]:
    """Flags, and the DeepSpeed JSON with the flags merged into it.

    Raises:
        ArgumentError, ScMoEConfigError: a setting that its user can correct.
        SystemExit: argparse's own findings (unknown flag, not a number), and --help.
    """
    from scmoe_ds.programs.flags.to_json import load_merged, merge_schedule, read_json, set_length

    args = parse_flags(build_parser(), SWIN_PRESETS, argv)
    whole = read_json(args)
    set_length(args, whole)
    require_flags(args, (*SIZES, "train_iters"))
    check_training(args)
    return args, load_merged(args, merge_schedule(whole, args))


def swin_settings(args: argparse.Namespace) -> SwinSettings:
    """The model's shape.

    Raises:
        ArgumentError: sizes that do not fit.
    """
    try:
        return SwinSettings(
            image_size=args.img_size,
            window_size=args.window_size,
            embed_dim=args.embed_dim,
            depths=args.depths,
            num_heads=args.num_heads,
            num_classes=args.num_classes,
            patch_size=args.patch_dim,
            num_channels=args.num_channels,
            drop_path_rate=args.drop_path_rate,
            hidden_dropout=args.hidden_dropout,
            attention_dropout=args.attention_dropout,
            init_method_std=args.init_method_std,
        )
    except ValueError as error:
        raise ArgumentError(str(error)) from None

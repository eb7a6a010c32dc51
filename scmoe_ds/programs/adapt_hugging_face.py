"""The directory of a Hugging Face model, with an MoE or dense, becomes that of a ScMoE: scmoe adapt."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scmoe_ds.checkpoint.adapted.dense import as_moe
from scmoe_ds.checkpoint.adapted.surgery import adapt_hugging_face
from scmoe_ds.checkpoint.adapted.text import TextSettings
from scmoe_ds.errors import ArgumentError
from scmoe_ds.inference.model import DTYPES
from scmoe_ds.programs.adapt_measure import measured
from scmoe_ds.programs.adapt_sources import hugging_face_source


def adapt(args: argparse.Namespace, changes: Mapping[str, Any]) -> None:
    """Surgery, and what it says of it.

    Args:
        args: flags of scmoe adapt.
        changes: the fields of the "scmoe" section among them.
    """
    if args.format != "scmoe":
        raise ArgumentError(
            f"--format {args.format}: {args.source} is of Hugging Face, and so is the result; remove it"
        )
    fields = {**changes, "layers": args.layers, "shared_expert": args.shared_expert}
    text = None
    if args.text_file is not None:
        text = TextSettings(Path(args.text_file), args.seq_length, args.batch_size, args.max_tokens)
    dtype = DTYPES[args.dtype] if args.dtype else None
    beside = args.output or Path(tempfile.gettempdir()) / "scmoe_adapt"
    with as_moe(args.source, beside, fields, args.experts, args.noise) as source:
        if source != args.source:
            fields["top_k"] = None  # the MoE that was made has it already
            print(f"{args.source}: each MLP became {args.experts} experts")
        if args.measure is not None:
            if not measured(args, hugging_face_source(args, source, fields)):
                return
            fields |= {"position": args.position, "join": args.join, "layers": args.layers}
        for line in adapt_hugging_face(source, args.output, fields, dtype, text):
            print(line)
    print(
        f"wrote {args.output} of {args.source}; "
        f'AutoModelForCausalLM.from_pretrained("{args.output}", trust_remote_code=True) loads it'
    )

"""Makes a ScMoE of the directory of a trained Hugging Face MoE model, file by file.

The source's weights are copied as they are. What the ScMoE has more goes into one more file, under
`….layers.N.shortcut`: norms, shared experts, coefficients.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from scmoe_ds.checkpoint.adapted.experts import ExpertsInFiles
from scmoe_ds.checkpoint.adapted.family import MODELING_FILE, adapted_config, modeling_file
from scmoe_ds.checkpoint.adapted.source import SourceDirectory
from scmoe_ds.checkpoint.adapted.text import Text, TextSettings
from scmoe_ds.checkpoint.autoep import shards
from scmoe_ds.checkpoint.autoep.tensor_slices import LazyTensor, close
from scmoe_ds.checkpoint.safetensors_files import INDEX_FILE
from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.errors import ArgumentError, CheckpointError
from scmoe_ds.moe.merge_start import FITTED_SHARE, SHARE
from scmoe_ds.replace.modeling_adapted import SHARED, ShortcutParts, add_parts
from scmoe_ds.replace.origin import CONFIG_FILE
from scmoe_ds.replace.surgery import start_parts

_KINDS = {"none": "none", "mean": "the mean expert", "busiest": "the busiest expert", "fit": "fitted to the text"}
DEFAULTS = {"position": "pos1", "first_layer_position": None, "join": "end", "shortcut_norm": "own", "top_k": None}


def adapt_hugging_face(
    path: Path, out: Path, fields: Mapping[str, Any], dtype: torch.dtype | None = None, text: TextSettings | None = None
) -> list[str]:
    """Writes a directory that `AutoModelForCausalLM.from_pretrained(…, trust_remote_code=True)` loads.

    One file of the source is in memory at a time. With a text, the model is, once.

    Args:
        path: the trained model's directory.
        out: a directory that is empty or does not exist.
        fields: of the "scmoe" section that are not as in DEFAULTS; `layers` and `shared_expert` as in its "adapt".
        dtype: of the weights; None: the source's.
        text: on which losses and, for the busiest expert, tokens per expert are measured.

    Returns:
        what was done, in lines.

    Raises:
        UserError: a source that cannot become such a ScMoE, or a directory that cannot be written.
    """
    source = SourceDirectory(path)
    try:
        scmoe = settings_of(source, fields)
        parts = empty_parts(source, scmoe)
        measured = None if text is None else Text(source, text)
        said = [f"{source.model.config.model_type}: {_described(source, scmoe, list(parts))}"]
        kind = scmoe["adapt"]["shared_expert"]
        if kind in ("busiest", "fit") and measured is None:
            raise ArgumentError(f"--shared-expert {kind}: is measured on text; name a file by --text-file, or use mean")
        before = None if measured is None else measured.loss()
        state: dict[str, Tensor] = {}
        for number, each in parts.items():
            state |= start_of(source, number, each, scmoe, measured)
            said += [] if kind != "busiest" or measured is None else [measured.of_busiest(number)]
        if kind == "fit" and measured is not None:
            measured.fit(scmoe, state)
        part = shards.claim(out)
        with shards.one_sentence(out):
            _write(source, part, state, scmoe, dtype)
            shards.publish(part, out)
        said.append(f"{len(state)} new weights, {sum(each.numel() for each in state.values()):,} parameters")
        if measured is not None and text is not None:
            after = measured.loss_of(scmoe, state)
            said.append(
                f"loss on {text.file} ({measured.tokens:,} tokens): {before:.4f} before, {after:.4f} after surgery"
            )
        return said
    finally:
        close()


def settings_of(source: SourceDirectory, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The "scmoe" object of the new config.json, validated.

    Raises:
        UserError: a value that breaks a rule of the section, or that the source cannot have.
    """
    given = {name: value for name, value in fields.items() if value is not None}
    adapt = {name: given.pop(name, default) for name, default in (("layers", None), ("shared_expert", "none"))}
    merge = "add" if adapt["shared_expert"] == "none" else "cg1"
    scmoe = {**DEFAULTS, "merge": merge, **given, "adapt": adapt}
    experts = source.model.get_submodule(f"{source.blocks[source.layers[0]][0]}.mlp.experts").num_experts
    most = source.model.config.num_experts_per_tok
    top_k = most if scmoe["top_k"] is None else scmoe["top_k"]
    if not 1 <= top_k <= most:
        raise ArgumentError(f"--top-k {top_k}: {source.path} routes a token to {most} experts; use 1 … {most}")
    checked = {"architecture": "scmoe", "num_experts": experts, **scmoe, "top_k": top_k}
    ScMoEConfig(**{name: value for name, value in checked.items() if value is not None})
    return scmoe


def empty_parts(source: SourceDirectory, scmoe: Mapping[str, Any]) -> dict[int, ShortcutParts]:
    """The parts of each layer that is converted, by its number, without memory."""
    try:
        return add_parts(source.model, scmoe)
    except ValueError as error:
        raise CheckpointError(f"{source.path}: {error}") from None


def start_of(
    source: SourceDirectory, number: int, parts: ShortcutParts, scmoe: Mapping[str, Any], measured: Text | None
) -> dict[str, Tensor]:
    """The new weights of a layer, by their names in the files."""
    place = source.layers[number]
    begin = source.names_of(place)
    norm = source.read(f"{begin}post_attention_layernorm.weight")
    parts, kind = parts.to_empty(device="cpu"), scmoe["adapt"]["shared_expert"]

    def experts() -> tuple[Tensor, Tensor]:
        found = ExpertsInFiles(source, place)
        if kind in ("mean", "fit"):
            return found.mean()
        assert measured is not None
        return found.read(measured.busiest(number))

    if parts.norm is not None:
        parts.norm.load_state_dict({"weight": norm})
    start_parts(parts, scmoe["merge"], experts, FITTED_SHARE[scmoe["merge"]] if kind == "fit" else SHARE)
    return {f"{begin}shortcut.{name}": each.detach().to(norm.dtype) for name, each in parts.state_dict().items()}


def _write(
    source: SourceDirectory, part: Path, state: dict[str, Tensor], scmoe: Mapping[str, Any], dtype: torch.dtype | None
) -> None:
    files, total = source.files(), 0
    weight_map: dict[str, str] = {}
    count = len(files) + bool(state)
    names = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    for (file, tensors), name in zip(files.items(), names, strict=False):
        if dtype is None:
            shutil.copyfile(file, part / name)
        else:
            held = {each.name: _cast(each, dtype) for each in tensors}
            save_file(held, part / name, metadata={"format": "pt"})
        total += (part / name).stat().st_size
        weight_map |= {each.name: name for each in tensors}
    if state:
        held = {name: tensor.to(dtype or tensor.dtype).contiguous() for name, tensor in state.items()}
        save_file(held, part / names[-1], metadata={"format": "pt"})
        total += sum(tensor.nbytes for tensor in held.values())
        weight_map |= dict.fromkeys(held, names[-1])
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (part / INDEX_FILE).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    config = adapted_config(source.config, scmoe)
    if dtype is not None:
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = str(dtype).removeprefix("torch.")
    (part / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (part / MODELING_FILE).write_text(modeling_file(source.model), encoding="utf-8")
    shards.carry(source.path, part)


def _cast(tensor: LazyTensor, dtype: torch.dtype) -> Tensor:
    """A router's correction bias moves in small steps, which bf16 would lose."""
    found = tensor[...]
    return found if tensor.name.endswith("e_score_correction_bias") else found.to(dtype)


def _described(source: SourceDirectory, scmoe: Mapping[str, Any], numbers: list[int]) -> str:
    """What the surgery does, in a line."""
    which = "all" if len(numbers) == len(source.layers) else ", ".join(map(str, numbers)) or "none"
    kind, has_own = scmoe["adapt"]["shared_expert"], any(map(_has_shared, (block for _, block in source.blocks)))
    shared = "the source's" if has_own else _KINDS[kind]
    if kind not in ("none", "fit") and scmoe["merge"] == "add":
        shared += f", times {SHARE}"
    norm = "a copy of the MoE's norm" if scmoe["shortcut_norm"] == "own" else "the norm of the tapped block"
    return (
        f"{len(numbers)} of {len(source.layers)} MoE layers ({which}) read their experts' input at {scmoe['position']} "
        f"through {norm}; shared expert: {shared}; merge {scmoe['merge']}; join {scmoe['join']}"
    )


def _has_shared(block: Any) -> bool:
    return any(hasattr(block.mlp, each) for each in SHARED)

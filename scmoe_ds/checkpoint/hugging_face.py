"""An export that transformers loads, too: what config.json says to it, the model's code, and the tokenizer.

The weights keep their names, so `--load` accepts the same directory. `modeling_scmoe.py` is copied as it is.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scmoe_ds.checkpoint import tokenizer_files
from scmoe_ds.checkpoint.parsing import Parsed
from scmoe_ds.config.adapt_section import same_layers, section_of_base
from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.data.tokenizer import Tokenizer
from scmoe_ds.errors import CheckpointError, one_line
from scmoe_ds.models.layers import GPTSettings
from scmoe_ds.models.vision_language_settings import reads_images

logger = logging.getLogger("scmoe_ds")

MODELING_FILE = "modeling_scmoe.py"
_END_OF_DOCUMENT = "<|endoftext|>"
_OF_SETTINGS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_key_value_heads",
    "intermediate_size": "ffn_hidden_size",
    "max_position_embeddings": "max_position_embeddings",
    "normalization": "normalization",
    "swiglu": "swiglu",
    "position_embedding": "position_embedding",
    "rotary_base": "rotary_base",
    "add_bias_linear": "add_bias_linear",
    "tie_word_embeddings": "tie_embeddings",
    "hidden_dropout": "hidden_dropout",
    "attention_dropout": "attention_dropout",
    "layernorm_epsilon": "layernorm_epsilon",
    "initializer_range": "init_method_std",
    "norm_placement": "norm_placement",
    "residual_scale": "residual_scale",
}
"""Fields of modeling_scmoe's ScMoEConfig to those of GPTSettings."""
_OF_SECTION = {
    "moe_every": "moe_every",
    "num_experts": "num_experts",
    "num_experts_per_tok": "top_k",
    "position": "position",
    "first_layer_position": "first_layer_position",
    "shortcut_distance": "shortcut_distance",
    "shortcut_norm": "shortcut_norm",
    "post_norm": "post_norm",
    "pairs_per_moe": "pairs_per_moe",
    "join": "join",
    "moe_intermediate_size": "moe_ffn_hidden_size",
    "shared_expert_intermediate_size": "moe_shared_expert_intermediate_size",
    "router_aux_loss_coef": "aux_loss_coefficient",
}
_SAME_FUNCTION = {"pipelined_topk": "topk", "overlapped_shared_expert": "shared_expert"}


def describe_for_transformers(parsed: Parsed, tokenizer: Mapping[str, Any] | None) -> dict[str, Any]:
    """What config.json says to transformers.

    Args:
        parsed: of the checkpoint.
        tokenizer: its record; None: unknown.

    Raises:
        CheckpointError: no GPT.
    """
    settings, config = parsed.settings, parsed.config
    if not isinstance(settings, GPTSettings) or reads_images(settings):
        kind = "vision-language model" if isinstance(settings, GPTSettings) else "Swin"
        raise CheckpointError(
            f"--format hf: the checkpoint is of a {kind}; only text models have a class of transformers"
        )
    if config.expert_partition > 1:
        raise CheckpointError(
            "--format hf: the experts are in parts (scmoe.expert_partition), which transformers has no field for; "
            "partition the whole model by scmoe convert partition --method complete, and export that"
        )
    found = {name: getattr(settings, field) for name, field in _OF_SETTINGS.items()}
    found |= {name: getattr(config, field, None) for name, field in _OF_SECTION.items()}
    end = {} if tokenizer is None else dict.fromkeys(("bos_token_id", "eos_token_id"), tokenizer["identity"]["eod"])
    return {
        "architectures": ["ScMoEForCausalLM"],
        "auto_map": {
            "AutoConfig": "modeling_scmoe.ScMoEConfig",
            "AutoModelForCausalLM": "modeling_scmoe.ScMoEForCausalLM",
        },
        "model_type": "scmoe_gpt",
        **found,
        "moe_architecture": _SAME_FUNCTION.get(config.architecture, config.architecture),
        "merge": same_layers(config)["merge"],
        "gate_softmax": _gate_softmax(config),
        "router": _router(config),
        **_converted(config),
        **end,
    }


def _converted(config: ScMoEConfig) -> dict[str, Any]:
    """Of a model that is converted in part: which pairs are, and what differs in the others."""
    if config.adapt is None or config.adapt.base is None or config.adapt.layers is None:
        return {}
    base = section_of_base(config)
    others = {
        "moe_architecture": _SAME_FUNCTION[base.architecture],
        "num_experts_per_tok": base.top_k,
        "merge": base.merge,
        "join": base.join,
        "gate_softmax": _gate_softmax(base),
        "router": _router(base),
    }
    return {"scmoe_layers": sorted(config.adapt.layers), "other_layers": others}


def _gate_softmax(config: ScMoEConfig) -> str:
    """Without drops the chosen experts are the kept ones."""
    if config.gate_softmax == "deepspeed":
        return "all" if config.top_k == 1 else "renormalised"
    return "all" if config.gate_softmax == "all" else "chosen"


def _router(config: ScMoEConfig) -> dict[str, Any] | None:
    router = config.router
    if router.score_func is None:
        return None
    names = ("score_func", "route_scale", "num_expert_groups", "num_limited_groups", "group_score_func")
    own = {name: getattr(router, name) for name in names}
    return {**own, "route_norm": router.normalises(config.top_k), "has_bias": router.has_bias}


def files_for_transformers(directory: Path, vocab_size: int, record: Mapping[str, Any] | None) -> dict[str, bytes]:
    """Names and contents of the files beside the weights: the code, settings of generation, the tokenizer's.

    Args:
        directory: of the checkpoint.
        vocab_size: of the model; tokens behind those of the tokenizer are padding, which is never generated.
        record: of the tokenizer; None: unknown.
    """
    found = {MODELING_FILE: Path(__file__).with_name(MODELING_FILE).read_bytes()}
    if record is None:
        logger.warning("the checkpoint does not record its tokenizer: hand one to transformers yourself")
        return found
    end, used = record["identity"]["eod"], record["identity"]["vocab_size"]
    generation: dict[str, Any] = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), end)
    if used < vocab_size:
        generation["suppress_tokens"] = list(range(used, vocab_size))
    found["generation_config.json"] = (json.dumps(generation) + "\n").encode()
    try:
        return found | _tokenizer_files(tokenizer_files.recorded_tokenizer(directory, record, "the checkpoint"))
    except Exception as error:  # of transformers and tokenizers: any
        logger.warning(f"no tokenizer for transformers ({one_line(error)}): hand yours over yourself")
        return found


def _tokenizer_files(tokenizer: Tokenizer) -> dict[str, bytes]:
    """Files of a tokenizer of transformers that gives the same ids; none for one that is transformers' already."""
    if tokenizer.name == "HuggingFaceTokenizer":
        return {}
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(
        tokenizer_object=_byte_level(tokenizer),
        bos_token=_END_OF_DOCUMENT,
        eos_token=_END_OF_DOCUMENT,
        pad_token=_END_OF_DOCUMENT,
        clean_up_tokenization_spaces=False,
    )
    ids = fast(tokenizer_files.PROBE, add_special_tokens=False)["input_ids"]
    if fast.eos_token_id != tokenizer.eod or ids != tokenizer.tokenize(tokenizer_files.PROBE):
        raise CheckpointError(f"its {tokenizer.name} gives other ids there")
    with tempfile.TemporaryDirectory() as directory:
        fast.save_pretrained(directory)
        return {path.name: path.read_bytes() for path in sorted(Path(directory).iterdir())}


def _byte_level(tokenizer: Tokenizer) -> Any:
    """A ByteTokenizer is a byte-level BPE without merges; GPT-2's is one with its own."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Fast

    files = tokenizer.files()
    if files:
        vocabulary = json.loads(files["vocab.json"])
        lines = files["merges.txt"].decode("utf-8").splitlines()
        pairs = [line.split() for line in lines if line and not line.startswith("#version")]
        merges = [(first, second) for first, second in pairs]
    else:
        vocabulary, merges = {_letter(byte): byte for byte in range(256)}, []
    fast = Fast(models.BPE(vocabulary, merges))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=bool(files))
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens([AddedToken(_END_OF_DOCUMENT, normalized=False, special=True)])
    return fast


def _letter(byte: int) -> str:
    """The letter that stands for a byte in byte-level vocabularies: itself if it can be seen, else one from 256 on."""
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return chr(byte) if byte in seen else chr(256 + sorted({*range(256)} - {*seen}).index(byte))

"""Small Hugging Face models with random weights; nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable

import transformers
from torch import nn

LAYERS, VOCABULARY = 4, 32
SHAPE = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
TEXT_SHAPE = {**SHAPE, "vocab_size": VOCABULARY, "max_position_embeddings": 16}


def gpt2() -> nn.Module:
    """Without dropout in its MLPs: the rows that an expert computes, and so their masks, depend on the layout."""
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=16,
            n_embd=16,
            n_layer=LAYERS,
            n_head=2,
            resid_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def like_llama(config: type, model: type) -> nn.Module:
    return model(config(**TEXT_SHAPE, num_hidden_layers=LAYERS, num_key_value_heads=1))


def gpt_neox() -> nn.Module:
    config = transformers.GPTNeoXConfig(**TEXT_SHAPE, num_hidden_layers=LAYERS, use_parallel_residual=False)
    return transformers.GPTNeoXForCausalLM(config)


def vit() -> nn.Module:
    image = {"image_size": 8, "patch_size": 4, "num_channels": 1, "num_labels": 3}
    return transformers.ViTForImageClassification(transformers.ViTConfig(**SHAPE, **image, num_hidden_layers=LAYERS))


def swin() -> nn.Module:
    return transformers.SwinForImageClassification(
        transformers.SwinConfig(
            image_size=16,
            patch_size=2,
            num_channels=1,
            embed_dim=8,
            depths=[2, 2],
            num_heads=[1, 2],
            window_size=4,
            num_labels=3,
            mlp_ratio=2.0,
            drop_path_rate=0.0,
        )
    )


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "GPT-2": gpt2,
    "LLaMA": lambda: like_llama(transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "Mistral": lambda: like_llama(transformers.MistralConfig, transformers.MistralForCausalLM),
    "Qwen2": lambda: like_llama(transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "GPT-NeoX": gpt_neox,
    "ViT": vit,
    "Swin": swin,
}

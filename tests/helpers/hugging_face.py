"""Small Hugging Face models with random weights; nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable

import transformers
from torch import nn

LAYERS, VOCABULARY = 4, 32


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
    return model(
        config(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=LAYERS,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=16,
        )
    )


def gpt_neox() -> nn.Module:
    return transformers.GPTNeoXForCausalLM(
        transformers.GPTNeoXConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=LAYERS,
            num_attention_heads=2,
            max_position_embeddings=16,
            use_parallel_residual=False,
        )
    )


def vit() -> nn.Module:
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=LAYERS,
            num_attention_heads=2,
            image_size=8,
            patch_size=4,
            num_channels=1,
            num_labels=3,
        )
    )


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

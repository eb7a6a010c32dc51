"""Which model a file is of: the same sizes from this package's settings and from a Hugging Face config."""

from __future__ import annotations

import transformers

from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.models.gpt import GPT
from scmoe_ds.models.identity import differences, identity
from scmoe_ds.models.swin import SwinMoE
from scmoe_ds.models.swin_settings import SwinSettings
from tests.helpers.settings import LLAMA

HF = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}


def test_one_model_in_two_packages() -> None:
    ours = identity(GPT(LLAMA, ScMoEConfig(num_experts=[2, 4])))
    assert ours["moe_blocks"] == [1, 3] and ours["num_experts"] == [2, 4]
    theirs = identity(transformers.LlamaForCausalLM(transformers.LlamaConfig(**HF, intermediate_size=128)))
    assert theirs.keys() == ours.keys() - {"moe_blocks", "num_experts"}
    assert differences(theirs, ours) == []
    wide = identity(transformers.LlamaForCausalLM(transformers.LlamaConfig(**HF, intermediate_size=96)))
    assert differences(wide, ours) == ["ffn_hidden_size 96 and 128"]
    gpt2 = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=4, n_head=4)
    assert identity(transformers.GPT2LMHeadModel(gpt2)) == {
        "num_layers": 4,
        "hidden_size": 32,
        "num_attention_heads": 4,
    }


def test_pyramids_have_their_first_width_and_all_depths() -> None:
    shape = {"embed_dim": 8, "depths": [1, 1, 2, 2], "num_heads": [1, 1, 2, 2]}
    settings = SwinSettings(image_size=32, window_size=2, num_classes=3, patch_size=2, **shape)  # type: ignore[arg-type]
    ours = identity(SwinMoE(settings, ScMoEConfig(num_experts=2)))
    theirs = identity(transformers.Swinv2Model(transformers.Swinv2Config(image_size=32, window_size=2, **shape)))
    assert ours == theirs == {"num_layers": [1, 1, 2, 2], "hidden_size": 8, "num_attention_heads": [1, 1, 2, 2]}

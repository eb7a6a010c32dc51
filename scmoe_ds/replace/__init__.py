"""DeepSpeed MoE layers in models that others wrote → ScMoE, by hooks."""

from scmoe_ds.replace.replacement import replace_moe_layers, undo_replacement

__all__ = ["replace_moe_layers", "undo_replacement"]

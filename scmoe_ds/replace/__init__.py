"""DeepSpeed MoE layers in models that others wrote → ScMoE, by hooks; dense models → MoE."""

from scmoe_ds.replace.replacement import replace_moe_layers, undo_replacement
from scmoe_ds.replace.upcycle import load_balancing_loss, moe_from_dense

__all__ = ["load_balancing_loss", "moe_from_dense", "replace_moe_layers", "undo_replacement"]

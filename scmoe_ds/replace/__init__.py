"""ScMoE in models that others wrote: their MoE layers become ScMoE layers, and pairs by hooks.

`replacement` is the entry, `upcycle` the one for dense models. `taps` finds the tap, `tap_check` checks it, `convert`
makes the `layer`. `hooked` is the pair, `hooked_pass` one forward pass of it, `recomputation` what activation
checkpointing repeats, `token_mask` the padding. `calls` reads the arguments that a hook sees.
"""

from scmoe_ds.deepspeed_version import check  # noqa: F401 (its import checks DeepSpeed)
from scmoe_ds.replace.replacement import replace_moe_layers, undo_replacement
from scmoe_ds.replace.upcycle import load_balancing_loss, moe_from_dense

__all__ = ["load_balancing_loss", "moe_from_dense", "replace_moe_layers", "undo_replacement"]

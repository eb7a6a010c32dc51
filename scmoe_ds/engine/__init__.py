"""From a model and a DeepSpeed JSON to an engine.

`initialize` is the entry. `client_optimizer` gives experts parameter groups of their own, `pairs` finds the pairs of a
model and says what the section applies to, `whole_experts` is for tensor parallelism.
"""

from scmoe_ds.deepspeed_version import check  # noqa: F401 (its import checks DeepSpeed)
from scmoe_ds.engine.client_optimizer import parameter_groups
from scmoe_ds.engine.initialize import initialize
from scmoe_ds.parallel.process import connect, device

__all__ = ["connect", "device", "initialize", "parameter_groups"]

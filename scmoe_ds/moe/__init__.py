"""What is computed: gate, dispatch layouts, experts, merges, and the layers made of them.

`layer` is DeepSpeed's MoE in stages, `shortcut` the paper's layers on it: read these two first. `gate` routes tokens,
`layout` orders them as rows, `routed` has them in flight, `experts` computes them and `merge` adds the shared expert.
`early` is where decisions fall between gate and dispatch, and `decisions` has them. `placement` says who holds which
expert, `slices` what tensor-parallel ranks send. `build` makes the layer that a section describes, and
`deepspeed_gate` adapts DeepSpeed's own layers, the baselines.
"""

from scmoe_ds.deepspeed_version import check  # noqa: F401 (its import checks DeepSpeed)

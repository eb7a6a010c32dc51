"""Models that this package writes itself. Time is not their matter: scmoe_ds.overlap runs their pairs.

`blocks` has the Transformer block and `pairs` the pairs made of it; `gpt` and `swin` are whole models, `presets` and
`swin_settings` the paper's sizes of them. `layers` and `parallel_layers` are the dense parts, `recompute` is activation
checkpointing, `initialization` makes the weights.
"""

"""Tensors that live outside of the device's memory, in files or on the host, and are brought there in time.

`store` has room for a few experts on the device (`slots`), `sources` brings them there, from `files` or `pinned`
memory, on `readers`. `pages` is memory that files are read to directly, `widening` computes with weights that stay
narrow. Who opens a checkpoint says where its tensors lie (`files.Place`).

In training `trainable` takes the place of a layer's experts. `states` is the source of their store: `workers` make each
expert's `step` on the way, in a `room` that its sections pass through, and `records` keep these. `shape` lays an
expert's parameters out in one buffer. `own_checkpoints` refuses checkpoints that would lack the experts.
"""

from scmoe_ds.deepspeed_version import check  # noqa: F401 (its import checks DeepSpeed)

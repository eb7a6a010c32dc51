"""Tensors that live outside of the device's memory, in files or on the host, and are brought there in time.

`store` has room for a few experts on the device (`slots`), `sources` brings them there, from `files` or `pinned`
memory, on `readers`. `pages` is memory that files are read to directly, `widening` computes with weights that stay
narrow. Who opens a checkpoint says where its tensors lie (`files.Place`).
"""

from scmoe_ds.deepspeed_version import check  # noqa: F401 (its import checks DeepSpeed)

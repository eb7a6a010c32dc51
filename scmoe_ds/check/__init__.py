"""A training step on a GPU that is not there.

`fakes` makes tensors without values, `cuda`, `kernels` and `world` stand in for the driver, its operators and the other
ranks, `rows` says how many rows go where. `storages` and `work` count, `step` runs, `findings` says what was found.
"""

from scmoe_ds.deepspeed_version import check  # noqa: F401 (its import checks DeepSpeed)

"""Text from a trained model.

`load` loads it (`model` its weights), `model` calibrates prefill and decode. `generate` has the loop: a prefill, then
a decode pass per token, which `passes` has. `kv_cache` keeps what was read, `sampling` chooses tokens, `growing_text`
finds stop texts.

`offload` keeps routed experts out of the device's memory, with the room of that name. `pregate` guesses which ones a
standard MoE will need.
"""

from scmoe_ds.deepspeed_version import check  # noqa: F401 (its import checks DeepSpeed)

"""Text from a trained model.

`load` loads it (`model` its weights), `model` calibrates prefill and decode. `generate` has the loop: a prefill, then
a decode pass per token. `kv_cache` keeps what was read, `sampling` chooses tokens. `offload` keeps routed experts out
of the device's memory.
"""

"""Text from a trained model.

`load` loads it (`model` its weights), `kv_cache` keeps what was read, `sampling` chooses tokens, `generate` loops,
`phases` schedules prefill and decode apart, `offload` keeps routed experts out of the device's memory.
"""

"""Text from a trained model.

`load` loads it (`model` its weights), `model` calibrates prefill and decode. `generate` has the loop: a prefill, then
a decode pass per token. `kv_cache` keeps what was read, `sampling` chooses tokens, `growing_text` finds stop texts.

`offload` keeps routed experts out of the device's memory: `sources` reads them, `store` has room for a few of them, and
`pregate` guesses which ones a standard MoE will need.
"""

"""Command lines of the programs.

`gpt` and `swin` are those of training (`training` what they share, `data` and `tokenizer` the text), `to_json` merges
them into the DeepSpeed JSON. `megatron` knows Megatron-DeepSpeed's flags, `megatron_refused` those that end a run.
`model` and `analysis` are for programs that load a trained model. `parser` and `checks` serve all of them.
"""

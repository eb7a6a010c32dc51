"""Command lines of the programs. No module here imports torch at its top: --help and wrong flags answer at once.

`registry` has the programs. `parser` is argparse with `help` that fits a screen and a line for all mistakes; `unknown`
says what a flag that does not exist may have meant, by the `other_names` of other tools. `checks` has rules for values.

`gpt` and `swin` are those of training (`training` what they share, `data` and `tokenizer` the text), `to_json` merges
them into the DeepSpeed JSON. `megatron` knows Megatron-DeepSpeed's flags, `megatron_refused` those that end a run;
`table` writes the documentation's tables from both. `model` is for programs that load a trained model. The others are
the flags of the program of that name (`analysis`: scmoe analyze).
"""

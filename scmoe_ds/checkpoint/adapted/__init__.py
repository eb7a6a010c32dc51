"""Directories of adapted Hugging Face models: surgery on the files of a trained one, read and written lazily.

`surgery` is the entry, `source` the trained model's directory, `family` config.json and the file with the classes,
`experts` the routed experts in the files, `text` what is measured on text, `fit` a shared expert that is fitted to it.
`student` is the result in memory, `dense` makes an MoE of a dense model.
"""

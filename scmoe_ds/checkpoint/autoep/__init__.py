"""Weights of Hugging Face MoE models, in and out of AutoEP's layout, as the files that transformers reads.

`loading.from_pretrained` reads a rank's own experts and all other weights. `saving.save_pretrained` writes the weights
of a running engine, and `export.export_hugging_face` those of a checkpoint. Both ask `blueprint` how AutoEP, the model
and its files call each weight, and write what `shards` has laid out. `trained` reads DeepSpeed's checkpoint of an
AutoEP run; `replace/origin.py` is what it says about the model's own directory.
"""

"""Two kinds of sparsity of trained experts: DualSparse-MoE, arXiv 2508.18376.

`partition` divides experts by their neurons; the parts of `own_models` and `hugging_face` compute what they computed.
`importance` says which neurons matter, `calibration` what a text says of a model, whose layers are `own_layers` or
`hugging_face_layers`. `sparsity_file` is what was calibrated, beside the weights: how much computation a threshold
leaves out.
"""

from scmoe_ds.deepspeed_version import check  # noqa: F401 (its import checks DeepSpeed)

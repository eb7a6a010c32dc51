"""What can be divided in trained experts, and what can be left out (DualSparse-MoE, arXiv 2508.18376).

Experts in parts (`scmoe convert partition`):

    partition              divides an expert's weights by its neurons
    own_models             does so with checkpoints and exports of this package
    hugging_face           and with directories of Hugging Face

Thresholds for drops (`scmoe sparsify`):

    importance             which neurons of an expert matter
    calibration            what a text shows of a model's neurons and gates
    own_layers             the layers of this package's GPT while it is calibrated
    hugging_face_layers    and those of Hugging Face models
    sparsity_file          sparsity.json beside the weights: which threshold leaves out how much

Who drops at run time: scmoe_ds.moe.decisions.dropping, attached by scmoe_ds.inference.dropping.
"""

from scmoe_ds.deepspeed_version import check  # noqa: F401 (its import checks DeepSpeed)

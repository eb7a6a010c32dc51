"""Experts that wait in files or in the host's memory, and come to the device in time (paper appendix A.3).

In inference, from the layer down to the disk:

    store        which experts are on the device, which are coming, and which gives way
    slots        memory of the device for one expert each, written over by one expert after another
    sources      copies an expert into a slot: from pinned memory (`pinned`) or from files
    readers      who copies: a stream beside a GPU, a thread for files
    files        reads past the page cache; an `Extent` says where a tensor lies (checkpoint.extents finds it)
    pages        memory of whole pages, which such reads need
    widening     computes in fp32 with weights that stay bf16 in memory

In training:

    trainable    takes the place of a layer's experts: asks for weights, hands over gradients
    states       the source of the store: weights, gradients and optimizer states, whose `step` is made on the way
    shared       the same where several ranks have an expert: each makes the steps of some, and sends the weights
    turns        tasks of an expert one after another, and the buffers between them and the computation
    workers      the threads that do so, the most urgent task first; a `room` is the memory of one
    records      keeps what `states` has of each expert, in host memory or a file
    shape        an expert's parameters in one flat buffer
    own_checkpoints   refuses DeepSpeed's own checkpoints, which would lack the experts
"""

from scmoe_ds.deepspeed_version import check  # noqa: F401 (its import checks DeepSpeed)

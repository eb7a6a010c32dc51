"""Text and images to batches. Start with `dataset`: from Megatron's flags to training data.

Below it `splits` reads the flags, `indexed` checks the files, `sequences` reads them, `index_cache` keeps shuffled
indices on disk, `megatron_classes` fits both into megatron-core, and `sampler` gives each rank its micro-batches.
`reader`, `tokenizer` (`hugging_face_tokenizer`, `control_tokens`), `worker_processes` and `indexed_writer` turn text
files into datasets. `images` has images, `text_file` one text as tokens, `default_corpus` a corpus for a first run, and
`durable_files` writes files whole.
"""

import warnings

# megatron-core warns four times per process that it falls back to torch, as it is meant to here.
warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed", category=UserWarning)

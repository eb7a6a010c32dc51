"""Text to batches: tokenizers, Megatron's indexed datasets, and the order in which ranks read them."""

import warnings

# megatron-core warns four times per process that it falls back to torch, which is what is wanted here.
warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed", category=UserWarning)

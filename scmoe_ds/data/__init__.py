"""Text to batches: tokenizers, Megatron's indexed datasets, and the order in which ranks read them."""

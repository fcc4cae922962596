"""Which kernels run norms, rotary embeddings and activation functions."""

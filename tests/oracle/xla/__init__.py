"""One transformer block as a training step in jax, and what XLA's partitioner makes of it; runs in its own process."""

"""The layer-wise search: a strategy of its own for every layer of every stage, and stages of any size."""

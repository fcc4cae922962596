"""Operators of a model as a graph, and the optimisations over it: shardings, recomputed tensors."""

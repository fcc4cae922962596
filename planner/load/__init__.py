"""Requests against an iteration time: bound, fixed point, Markov chains and simulation of batching policies."""

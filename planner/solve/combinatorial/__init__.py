"""Combinatorial optimisation over priced tables: one module per problem, none of which knows a model or a technique."""

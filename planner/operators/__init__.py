"""The operators of a model as items of a ledger, one module per part of a model."""

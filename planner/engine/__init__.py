"""Where a ledger's items become seconds and bytes, kernel by kernel, phase by phase, block by block."""

# The package sets the number of devices before it imports jax, in a process of its own.
collect_ignore = ["xla"]

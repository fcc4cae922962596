"""How a micro-batch's weight gradients join those of the micro-batches before it."""

"""From a checkpoint to a directory for servers: operands in, tensors and config out."""

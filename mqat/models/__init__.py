"""Model families as data, and readers of foreign checkpoints."""

"""Low-rank adapters as peft stores them."""

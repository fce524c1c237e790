"""The export format of NeMo 1: a `.nemo` that its users train on."""

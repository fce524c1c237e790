"""Checkpoints: foreign readers, and Megatron's dist-checkpoints, saved and loaded."""

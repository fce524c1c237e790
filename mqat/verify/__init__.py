"""Proof that an exported directory is what was trained."""

"""Arithmetic of quantization on one tensor."""

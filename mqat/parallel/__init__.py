"""Tensor-parallel layouts, quantized linears, and sharded quantizer state."""

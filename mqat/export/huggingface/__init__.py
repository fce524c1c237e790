"""Hugging Face directories with quantized linears."""

"""mqat: quantization-aware training for Megatron-Core."""

__version__ = "0.1.0"

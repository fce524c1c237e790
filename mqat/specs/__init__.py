"""Layer specs in, quantized layer specs out."""

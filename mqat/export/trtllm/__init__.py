"""TensorRT-LLM checkpoints."""

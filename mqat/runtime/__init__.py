"""Process groups on CUDA or CPU."""

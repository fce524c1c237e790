"""The operators on CUDA: kernels in Triton, which every CUDA build of torch brings."""

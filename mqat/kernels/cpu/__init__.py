"""C++ passes for CPUs, compiled at first use."""

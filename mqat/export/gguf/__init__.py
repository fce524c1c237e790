"""The export format of llama.cpp: one GGUF file."""

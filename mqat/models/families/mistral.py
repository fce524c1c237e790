"""Mistral, dense: Llama whose tokens may attend to near ones only.

Sources: transformers `models/mistral`; llama.cpp and TensorRT-LLM use their Llama classes.
"""

from mqat.models.family import Family, SlidingWindow

MISTRAL = Family(
    name="mistral",
    hf_architecture="MistralForCausalLM",
    gguf_architecture="llama",
    is_interleaved_in_gguf=True,
    trtllm_architecture="MistralForCausalLM",
    decoder_types=("mistral", "llama"),
    window=SlidingWindow(4096),
)

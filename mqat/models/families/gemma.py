"""Gemma 1: scaled embedding, norms that multiply by 1 + weight, an MLP gated by GELU.

Sources: transformers `models/gemma`, llama.cpp `convert_hf_to_gguf.py` (`GemmaModel`, which stores
1 + weight), TensorRT-LLM `models/gemma/{config,model}.py` (the same; it scales the embedding itself).
"""

from mqat.models.family import Family
from mqat.models.structure import PROJ, QKV

GEMMA = Family(
    name="gemma",
    hf_architecture="GemmaForCausalLM",
    gguf_architecture="gemma",
    is_interleaved_in_gguf=False,
    trtllm_architecture="GemmaForCausalLM",
    decoder_types=("gemma",),
    zero_centered_gamma=True,
    activation="gelu_tanh",
    scales_embedding=True,
    bias_switches={"attention_bias": (QKV.name, PROJ.name)},
    head_dim_is_stated=True,
    hf_defaults={"tie_word_embeddings": True},
    hf_activations=("gelu_pytorch_tanh",),
    trtllm_activation="gelu_pytorch_tanh",
)

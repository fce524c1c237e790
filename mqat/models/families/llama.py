"""Llama 2 and 3, SmolLM: the decoder that the other families are variations of.

Sources: transformers `models/llama`, llama.cpp `convert_hf_to_gguf.py` (`LlamaModel`), TensorRT-LLM
`models/llama/config.py`.
"""

from mqat.models.family import Family
from mqat.models.structure import FC1, FC2, PROJ, QKV

LLAMA = Family(
    name="llama",
    hf_architecture="LlamaForCausalLM",
    gguf_architecture="llama",
    is_interleaved_in_gguf=True,
    trtllm_architecture="LlamaForCausalLM",
    decoder_types=("llama",),
    may_omit_groups=True,
    bias_switches={"attention_bias": (QKV.name, PROJ.name), "mlp_bias": (FC1.name, FC2.name)},
)

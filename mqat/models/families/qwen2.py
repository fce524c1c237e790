"""Qwen 2 and 2.5, dense: Llama with biases on query, key and value.

Sources: transformers `models/qwen2`, llama.cpp `convert_hf_to_gguf.py` (`Qwen2Model`), TensorRT-LLM
`models/qwen/{config,model}.py` (its output projection never has a bias).
"""

from mqat.models.family import Family, SlidingWindow
from mqat.models.structure import QKV

QWEN2 = Family(
    name="qwen2",
    hf_architecture="Qwen2ForCausalLM",
    gguf_architecture="qwen2",
    is_interleaved_in_gguf=False,
    trtllm_architecture="Qwen2ForCausalLM",
    decoder_types=("qwen2", "qwen"),
    biased=(QKV.name,),
    window=SlidingWindow(4096, switch="use_sliding_window", first_layer=("max_window_layers", 28)),
    trtllm_extra={"qwen_type": "qwen2", "seq_length": 8192, "use_logn_attn": False},
)

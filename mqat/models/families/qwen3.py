"""Qwen 3, dense: Llama whose query and key heads are normalized before they are rotated.

Sources: transformers `models/qwen3`, llama.cpp `convert_hf_to_gguf.py` (`Qwen3Model`), TensorRT-LLM
`models/qwen/{config,model}.py`.
"""

from mqat.models.family import Family, SlidingWindow
from mqat.models.structure import DENSE_NORMS, KEY_NORM, PROJ, QKV, QUERY_NORM

QWEN3 = Family(
    name="qwen3",
    hf_architecture="Qwen3ForCausalLM",
    gguf_architecture="qwen3",
    is_interleaved_in_gguf=False,
    trtllm_architecture="Qwen3ForCausalLM",
    decoder_types=("qwen3", "qwen"),
    norms=(*DENSE_NORMS, QUERY_NORM, KEY_NORM),
    bias_switches={"attention_bias": (QKV.name, PROJ.name)},
    head_dim_is_stated=True,
    window=SlidingWindow(4096, switch="use_sliding_window", first_layer=("max_window_layers", 28)),
    trtllm_extra={"qwen_type": "qwen3", "seq_length": 8192, "use_logn_attn": False},
)

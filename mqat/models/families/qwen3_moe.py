"""Qwen 3 with experts in the place of the MLP, in every layer or in some.

Sources: transformers `models/qwen3_moe`; TensorRT-LLM `models/qwen/{config,model}.py`.
"""

from mqat.models.experts import MIXTURE_NORM, ROUTER, Experts
from mqat.models.family import DenseLayers, Family, Mixture, SlidingWindow
from mqat.models.structure import INPUT_NORM, KEY_NORM, PROJ, QKV, QUERY_NORM

QWEN3_MOE = Family(
    name="qwen3_moe",
    hf_architecture="Qwen3MoeForCausalLM",
    gguf_architecture="qwen3moe",
    is_interleaved_in_gguf=False,
    trtllm_architecture="Qwen3MoeForCausalLM",
    decoder_types=("qwen3_moe",),
    linears=(QKV, PROJ),
    norms=(INPUT_NORM, MIXTURE_NORM, QUERY_NORM, KEY_NORM),
    bias_switches={"attention_bias": (QKV.name, PROJ.name)},
    window=SlidingWindow(4096, switch="use_sliding_window"),
    mixture=Mixture(
        experts=Experts("mlp.experts.{e}.", ("gate_proj", "up_proj", "down_proj"), ROUTER),
        count="num_experts",
        size="moe_intermediate_size",
        gguf_size="expert_feed_forward_length",
        normalizes="norm_topk_prob",
        dense=DenseLayers(listed="mlp_only_layers", step="decoder_sparse_step"),
    ),
    trtllm_activation="swiglu",
    trtllm_expert_size="moe_intermediate_size",
    trtllm_extra={"qwen_type": "qwen3_moe", "seq_length": 8192, "use_logn_attn": False},
)

"""Qwen 1.5 and 2 with experts, beside them a shared one whose output a sigmoid of the token weighs.

Its windows, which versions of transformers give to other layers, are refused.

Source: transformers `models/qwen2_moe`.
"""

from mqat.models.experts import MIXTURE_NORM, ROUTER, Experts, Shared
from mqat.models.family import DenseLayers, Family, Mixture
from mqat.models.structure import INPUT_NORM, PROJ, QKV

QWEN2_MOE = Family(
    name="qwen2_moe",
    hf_architecture="Qwen2MoeForCausalLM",
    gguf_architecture=None,
    is_interleaved_in_gguf=False,
    trtllm_architecture=None,
    decoder_types=("qwen2_moe",),
    linears=(QKV, PROJ),
    norms=(INPUT_NORM, MIXTURE_NORM),
    bias_switches={"qkv_bias": (QKV.name,)},
    hf_defaults={"qkv_bias": True},
    hf_harmless=("sliding_window",),  # read where use_sliding_window is true only
    mixture=Mixture(
        experts=Experts(
            "mlp.experts.{e}.",
            ("gate_proj", "up_proj", "down_proj"),
            ROUTER,
            Shared("mlp.shared_expert.", gate="mlp.shared_expert_gate"),
        ),
        count="num_experts",
        size="moe_intermediate_size",
        normalizes="norm_topk_prob",
        shared_size="shared_expert_intermediate_size",
        dense=DenseLayers(listed="mlp_only_layers", step="decoder_sparse_step"),
    ),
)

"""GLM 4.5 to 4.7: sigmoid scores, a correction that only chooses, shared experts, dense first layers.

The correction is a buffer in float32; in training it stays, unless `model.moe_router_bias_update_rate`
moves it. The further layers of its files, which predict several tokens at once, are left out.

Sources: transformers `models/glm4_moe`; Megatron-Core `transformer/moe/{router,moe_utils}.py`.
"""

from dataclasses import replace

from mqat.models.experts import MIXTURE_NORM, ROUTER, Experts, Shared
from mqat.models.family import DenseLayers, Family, Mixture
from mqat.models.structure import INPUT_NORM, KEY_NORM, PROJ, QKV, QUERY_NORM

GLM4_MOE = Family(
    name="glm4_moe",
    hf_architecture="Glm4MoeForCausalLM",
    gguf_architecture=None,
    is_interleaved_in_gguf=False,
    trtllm_architecture=None,
    decoder_types=("glm4_moe",),
    linears=(QKV, PROJ),
    norms=(INPUT_NORM, MIXTURE_NORM, QUERY_NORM, KEY_NORM),
    head_norms_switch="use_qk_norm",
    bias_switches={"attention_bias": (QKV.name,)},
    rotary_fraction=0.5,
    hf_further_layers="num_nextn_predict_layers",
    hf_defaults={
        "norm_topk_prob": True, "routed_scaling_factor": 1.0, "n_group": 1, "topk_group": 1,
        "n_shared_experts": 1, "first_k_dense_replace": 1,
    },
    mixture=Mixture(
        experts=Experts(
            "mlp.experts.{e}.",
            ("gate_proj", "up_proj", "down_proj"),
            replace(ROUTER, correction="e_score_correction_bias"),
            Shared("mlp.shared_experts."),
        ),
        count="n_routed_experts",
        size="moe_intermediate_size",
        normalizes="norm_topk_prob",
        scores="sigmoid",
        scaling="routed_scaling_factor",
        groups=("n_group", "topk_group"),
        shared_count="n_shared_experts",
        dense=DenseLayers(first="first_k_dense_replace"),
    ),
)  # fmt: skip

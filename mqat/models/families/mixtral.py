"""Mixtral: Mistral with experts in the place of the MLP; a token's weights are a softmax over its own.

Sources: transformers `models/mixtral`; TensorRT-LLM `models/llama` and `layers/moe.py`.
"""

from mqat.models.experts import MIXTURE_NORM, Experts, Router
from mqat.models.family import Family, Mixture, SlidingWindow
from mqat.models.structure import INPUT_NORM, PROJ, QKV

MIXTRAL = Family(
    name="mixtral",
    hf_architecture="MixtralForCausalLM",
    gguf_architecture="llama",
    is_interleaved_in_gguf=True,
    trtllm_architecture="MixtralForCausalLM",
    decoder_types=("mixtral",),
    linears=(QKV, PROJ),
    norms=(INPUT_NORM, MIXTURE_NORM),
    window=SlidingWindow(None),
    rope_theta=1e6,
    mixture=Mixture(
        experts=Experts(
            "block_sparse_moe.experts.{e}.",
            ("w1", "w3", "w2"),
            Router("mlp.router", "block_sparse_moe.gate", "mlp.router"),
        ),
        count="num_local_experts",
        size="intermediate_size",
    ),
    trtllm_activation="swiglu",
)

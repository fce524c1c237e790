"""Gemma 2: Gemma with norms around attention and MLP, caps, a window in every other layer.

Sources: transformers `models/gemma2`, TensorRT-LLM `models/gemma/{config,model}.py` (which is told no
window: its runtime is).
"""

from dataclasses import replace

from mqat.models.families.gemma import GEMMA
from mqat.models.family import SlidingWindow
from mqat.models.structure import ATTENTION_OUTPUT_NORM, INPUT_NORM, MLP_NORM, MLP_OUTPUT_NORM

INNER_NORM = replace(MLP_NORM, hf="pre_feedforward_layernorm", trtllm="pre_feedforward_layernorm")

GEMMA2 = replace(
    GEMMA,
    name="gemma2",
    hf_architecture="Gemma2ForCausalLM",
    gguf_architecture=None,
    trtllm_architecture="Gemma2ForCausalLM",
    decoder_types=("gemma2", "gemma"),
    norms=(INPUT_NORM, INNER_NORM, ATTENTION_OUTPUT_NORM, MLP_OUTPUT_NORM),
    window=SlidingWindow(4096, every=(None, 2)),
    attention={
        "query_pre_attn_scalar": 256,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    hf_keys={"hidden_act": "hidden_activation"},
    # The other activation is not read; how a cache is laid out.
    hf_harmless=("hidden_act", "cache_implementation"),
    trtllm_attention=(
        "query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping",
    ),
)  # fmt: skip

"""Gemma 3, its text model: Gemma 2 with norms of query and key heads in the place of capped scores.

Five layers of six look at a window, with a rotary base of their own. Sources: transformers
`models/gemma3`, llama.cpp `convert_hf_to_gguf.py` (`Gemma3Model`, which stores 1 + weight) and
`src/llama-model.cpp`, TensorRT-LLM `models/gemma/{config,model}.py`.
"""

from dataclasses import replace

from mqat.models.families.gemma2 import GEMMA2
from mqat.models.family import SlidingWindow
from mqat.models.structure import KEY_NORM, QUERY_NORM

GEMMA3 = replace(
    GEMMA2,
    name="gemma3_text",
    hf_architecture="Gemma3ForCausalLM",
    gguf_architecture="gemma3",
    trtllm_architecture="Gemma3ForCausalLM",
    decoder_types=("gemma3", "gemma"),
    norms=(*GEMMA2.norms, QUERY_NORM, KEY_NORM),
    window=SlidingWindow(4096, every=("sliding_window_pattern", 6)),
    rope_theta=1e6,
    attention={
        "query_pre_attn_scalar": 256,
        "final_logit_softcapping": None,
        "rope_local_base_freq": 10000.0,
    },
    # What transformers 5 saves beside the list of layers that it comes to.
    hf_harmless=(*GEMMA2.hf_harmless, "_sliding_window_pattern"),
    trtllm_attention=(
        "query_pre_attn_scalar", "final_logit_softcapping", "rope_local_base_freq", "sliding_window",
    ),
)  # fmt: skip

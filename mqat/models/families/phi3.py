"""Phi-3 and Phi-3.5 mini, Phi-4: Llama whose query, key and value are one tensor, and gate and up.

Sources: transformers `models/phi3`, TensorRT-LLM `models/phi3/{config,convert,model}.py` (whose `fc`
holds the activated branch last).
"""

from dataclasses import replace

from mqat.models.family import Family, SlidingWindow
from mqat.models.structure import CORE_ATTENTION, FC1, FC2, PROJ, QKV

_FUSED = "self_attn.qkv_proj"
_QKV = replace(QKV, parts=tuple(replace(part, hf=_FUSED) for part in QKV.parts))
_FC1 = replace(
    FC1,
    parts=tuple(replace(part, hf="mlp.gate_up_proj", trtllm="mlp.fc") for part in FC1.parts),
    trtllm_order=(1, 0),
)

PHI3 = Family(
    name="phi3",
    hf_architecture="Phi3ForCausalLM",
    gguf_architecture=None,
    is_interleaved_in_gguf=False,
    trtllm_architecture="Phi3ForCausalLM",
    decoder_types=("phi3", "phi"),
    linears=(_QKV, PROJ, _FC1, FC2),
    cache=replace(CORE_ATTENTION, hf_parts=(_FUSED, _FUSED)),
    may_omit_groups=True,
    rope_scalings=("longrope",),
    rotary_fraction=1.0,
    window=SlidingWindow(None),
    # Rates of dropout in pretraining.
    hf_harmless=("resid_pdrop", "embd_pdrop", "attention_dropout"),
    trtllm_activation="swiglu",
    trtllm_fraction="rotary_pct",
    trtllm_biases={},
    trtllm_states_head=False,
)

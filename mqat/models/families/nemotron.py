"""Nemotron-3 and -4, dense: LayerNorm1P, a squared ReLU without a gate, heads rotated in part.

Sources: transformers `models/nemotron`, TensorRT-LLM `models/gpt/{config,convert,model}.py` (whose norms
multiply by the weight).
"""

from mqat.models.family import Family
from mqat.models.structure import FC1, FC2, PLAIN_LINEARS, PROJ, QKV

NEMOTRON = Family(
    name="nemotron",
    hf_architecture="NemotronForCausalLM",
    gguf_architecture=None,
    is_interleaved_in_gguf=False,
    trtllm_architecture="NemotronForCausalLM",
    decoder_types=("nemotron", "gptnext", "gpt"),
    linears=PLAIN_LINEARS,
    normalization="LayerNorm",
    zero_centered_gamma=True,
    activation="relu2",
    bias_switches={"attention_bias": (QKV.name, PROJ.name), "mlp_bias": (FC1.name, FC2.name)},
    may_omit_groups=True,
    rotary_fraction=0.5,
    hf_keys={"rms_norm_eps": "norm_eps"},
    hf_activations=("relu2",),
    trtllm_activation="squared-relu",
    trtllm_fraction="rotary_pct",
    trtllm_biases={"bias": QKV.name},
    trtllm_extra={"gpt_variant": "nemotron"},
)

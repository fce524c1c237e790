"""StarCoder2: LayerNorm, GELU without a gate, biases everywhere.

Sources: transformers `models/starcoder2`, llama.cpp `convert_hf_to_gguf.py` (`StarCoder2Model`),
TensorRT-LLM `models/gpt/{config,convert,model}.py`.
"""

from dataclasses import replace

from mqat.models.family import Family, SlidingWindow
from mqat.models.structure import PLAIN_FC1, PLAIN_FC2, PROJ, QKV

_FC1 = replace(PLAIN_FC1, parts=(replace(PLAIN_FC1.parts[0], hf="mlp.c_fc"),))
_FC2 = replace(PLAIN_FC2, parts=(replace(PLAIN_FC2.parts[0], hf="mlp.c_proj"),))
LINEARS = (QKV, PROJ, _FC1, _FC2)

STARCODER2 = Family(
    name="starcoder2",
    hf_architecture="Starcoder2ForCausalLM",
    gguf_architecture="starcoder2",
    is_interleaved_in_gguf=False,
    trtllm_architecture="Starcoder2ForCausalLM",
    decoder_types=("starcoder2", "gpt"),
    linears=LINEARS,
    normalization="LayerNorm",
    activation="gelu_tanh",
    bias_switches={"use_bias": tuple(linear.name for linear in LINEARS)},
    window=SlidingWindow(None),
    hf_keys={"rms_norm_eps": "norm_epsilon"},
    hf_defaults={"tie_word_embeddings": True, "use_bias": True},
    hf_activations=("gelu_pytorch_tanh",),
    # Rates of dropout in pretraining, and names that the published files have beside those read.
    hf_harmless=(
        "residual_dropout", "embedding_dropout", "attention_dropout", "activation_function",
        "layer_norm_epsilon", "scale_attention_softmax_in_fp32",
    ),
    hf_fixed={"norm_type": "layer_norm", "mlp_type": "default"},
    trtllm_activation="gelu",
    trtllm_biases={"bias": QKV.name},
    trtllm_extra={"gpt_variant": "starcoder2"},
)  # fmt: skip

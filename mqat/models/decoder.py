"""The decoder of every family: what a configuration says, and what tensors are called elsewhere.

Names are data. `{i}` is the layer number; a fused Megatron tensor lists its Hugging Face parts in
row order. Sources: transformers `modeling_llama.py`, Megatron-Core `gpt_model.py`, and the
TensorRT-LLM checkpoint layout (`docs/source/legacy/architecture/checkpoint.md`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from mqat.models.families.llama import LLAMA
from mqat.models.families.mistral import MISTRAL
from mqat.models.families.qwen2 import QWEN2
from mqat.models.family import FC1, FC2, PROJ, QKV, Family

FAMILIES = {family.name: family for family in (LLAMA, MISTRAL, QWEN2)}

HF_EMBEDDING = "model.embed_tokens.weight"
HF_FINAL_NORM = "model.norm.weight"
HF_LM_HEAD = "lm_head.weight"
HF_LAYER = "model.layers.{i}."

# Megatron-Core parameter (after `decoder.layers.N.`) -> Hugging Face tensors (after `HF_LAYER`).
HF_LAYER_TENSORS: dict[str, tuple[str, ...]] = {
    "input_layernorm.weight": ("input_layernorm.weight",),
    "self_attention.linear_qkv.weight": (
        "self_attn.q_proj.weight",
        "self_attn.k_proj.weight",
        "self_attn.v_proj.weight",
    ),
    "self_attention.linear_proj.weight": ("self_attn.o_proj.weight",),
    "pre_mlp_layernorm.weight": ("post_attention_layernorm.weight",),
    "mlp.linear_fc1.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "mlp.linear_fc2.weight": ("mlp.down_proj.weight",),
}

# The linears of a layer, in the order of the forward pass; quantization policies name these.
LINEARS = (QKV, PROJ, FC1, FC2)

# Vocabulary tables; policies quantize these only where a rule names them.
EMBEDDING, OUTPUT_LAYER = "embedding.word_embeddings", "output_layer"
TABLES = (EMBEDDING, OUTPUT_LAYER)

# Where keys and values are cached, in every layer.
CORE_ATTENTION = "self_attention.core_attention"

# Megatron-Core linear -> Hugging Face modules (after `HF_LAYER`), in row order.
HF_LINEARS: dict[str, tuple[str, ...]] = {
    linear: tuple(name.removesuffix(".weight") for name in HF_LAYER_TENSORS[f"{linear}.weight"])
    for linear in LINEARS
}


def hf_parts(parameter: str) -> tuple[str, ...]:
    """Hugging Face tensors, after `HF_LAYER` and in row order, of a parameter inside a layer."""
    linear = parameter.removesuffix(".bias")
    if linear == parameter:
        return HF_LAYER_TENSORS[parameter]
    return tuple(f"{module}.bias" for module in HF_LINEARS[linear])


# Megatron-Core linear that a norm feeds -> Hugging Face norm (after `HF_LAYER`).
HF_NORMS: dict[str, str] = {
    "self_attention.linear_qkv": "input_layernorm",
    "mlp.linear_fc1": "post_attention_layernorm",
}

TRTLLM_EMBEDDING = "transformer.vocab_embedding"
TRTLLM_FINAL_NORM = "transformer.ln_f"
TRTLLM_LM_HEAD = "lm_head"
TRTLLM_LAYER = "transformer.layers.{i}."

# Megatron-Core linear -> TensorRT-LLM modules (after `TRTLLM_LAYER`), in row order. TensorRT-LLM's
# `fc` is the activated (gate) branch and its `gate` the linear (up) branch.
TRTLLM_LINEARS: dict[str, tuple[str, ...]] = {
    "self_attention.linear_qkv": ("attention.qkv",),
    "self_attention.linear_proj": ("attention.dense",),
    "mlp.linear_fc1": ("mlp.fc", "mlp.gate"),
    "mlp.linear_fc2": ("mlp.proj",),
}

# Megatron-Core linear that a norm feeds -> TensorRT-LLM norm. Checkpoints name the norm after the
# linear, `decoder.layers.<linear>.layer_norm_weight`, as Transformer Engine's fused layers do.
TRTLLM_NORMS: dict[str, str] = {
    "self_attention.linear_qkv": "input_layernorm",
    "mlp.linear_fc1": "post_layernorm",
}


@dataclass(frozen=True)
class DecoderConfig:
    """Shape of a decoder; all sizes are global, before any parallel split."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    family: str = LLAMA.name
    biases: tuple[str, ...] = ()  # of `LINEARS`

    def __post_init__(self) -> None:
        """Raises ValueError for sizes that no layout can make work, and biases that none has."""
        if self.family not in FAMILIES:
            raise ValueError(f"model.family={self.family!r}: must be one of {', '.join(FAMILIES)}.")
        object.__setattr__(self, "biases", tuple(self.biases))  # a list where it comes from JSON
        FAMILIES[self.family].switches_of(self.biases)
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int) and not isinstance(value, bool) and value < 1:
                raise ValueError(f"model.{field.name}={value}: must be at least 1.")
        if self.num_attention_heads % self.num_query_groups:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_query_groups={self.num_query_groups} (num_key_value_heads in Hugging Face)."
            )

    @property
    def qkv_out_features(self) -> int:
        """Rows of the fused query/key/value weight."""
        return (self.num_attention_heads + 2 * self.num_query_groups) * self.head_dim

    def linear_shape(self, linear: str) -> tuple[int, int]:
        """Global (out_features, in_features) of one of `LINEARS`."""
        attention_width = self.num_attention_heads * self.head_dim
        return {
            "self_attention.linear_qkv": (self.qkv_out_features, self.hidden_size),
            "self_attention.linear_proj": (self.hidden_size, attention_width),
            "mlp.linear_fc1": (2 * self.intermediate_size, self.hidden_size),
            "mlp.linear_fc2": (self.hidden_size, self.intermediate_size),
        }[linear]

    def checkpoint_shapes(self) -> dict[str, tuple[int, ...]]:
        """Global shape of every weight in a checkpoint; vocabulary tables may have more rows.

        Megatron stacks the layers of a model in one tensor, whose first dimension is the layer.
        """
        shapes: dict[str, tuple[int, ...]] = {
            "embedding.word_embeddings.weight": (self.vocab_size, self.hidden_size),
            "decoder.final_layernorm.weight": (self.hidden_size,),
        }
        if not self.tie_word_embeddings:
            shapes["output_layer.weight"] = (self.vocab_size, self.hidden_size)
        for linear in LINEARS:
            stacked = (self.num_layers, *self.linear_shape(linear))
            shapes[f"decoder.layers.{linear}.weight"] = stacked
            if linear in self.biases:
                shapes[f"decoder.layers.{linear}.bias"] = stacked[:2]
        for linear in TRTLLM_NORMS:
            key = f"decoder.layers.{linear}.layer_norm_weight"
            shapes[key] = (self.num_layers, self.hidden_size)
        return shapes

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe form, as stored in `mqat.json`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DecoderConfig:
        """Inverse of `to_dict`; an unknown or missing key is a ValueError."""
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"model: unknown keys {unknown}; known keys are {sorted(known)}.")
        try:
            return cls(**values)
        except TypeError as error:
            raise ValueError(f"model: {error}.") from error

    def to_hf(self, dtype: str) -> dict[str, Any]:
        """The Hugging Face `config.json` object, in the spelling that transformers 4 and 5 read.

        Args:
            dtype: Of unquantized tensors, such as `bfloat16`.
        """
        family = FAMILIES[self.family]
        return {
            "architectures": [family.hf_architecture],
            "model_type": family.name,
            "torch_dtype": dtype,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_query_groups,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": self.rope_scaling,
            "max_position_embeddings": self.max_position_embeddings,
            **family.switches_of(self.biases),
            **family.hf_extra,
            "tie_word_embeddings": self.tie_word_embeddings,
            "use_cache": True,
        }

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> DecoderConfig:
        """From a Hugging Face `config.json` object (transformers 4 and 5 spellings of RoPE).

        Raises:
            ValueError: Not one of `FAMILIES`, or it uses a feature that is not built (another
                activation, sliding windows, other rotary scalings).
        """
        if not isinstance(hf, Mapping):
            raise ValueError(f"config.json: expected a JSON object, found {type(hf).__name__}.")
        family = FAMILIES.get(str(hf.get("model_type")))
        if family is None:
            raise ValueError(
                f"model_type={hf.get('model_type')!r}: supported are {', '.join(FAMILIES)}; convert "
                "the checkpoint to LlamaForCausalLM if it is equivalent."
            )
        if hf.get("hidden_act", "silu") != "silu":
            raise ValueError(f"hidden_act={hf['hidden_act']!r}: only 'silu' is supported.")
        _check_window(family, hf)
        rope = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
        theta = rope.pop("rope_theta", hf.get("rope_theta", 10000.0))
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        if rope_type not in ("default", "llama3"):
            raise ValueError(f"rope_type={rope_type!r}: only 'default' and 'llama3' are supported.")
        heads = int(hf["num_attention_heads"])
        return cls(
            vocab_size=int(hf["vocab_size"]),
            hidden_size=int(hf["hidden_size"]),
            intermediate_size=int(hf["intermediate_size"]),
            num_layers=int(hf["num_hidden_layers"]),
            num_attention_heads=heads,
            num_query_groups=int(hf.get("num_key_value_heads") or heads),
            head_dim=int(hf.get("head_dim") or int(hf["hidden_size"]) // heads),
            rms_norm_eps=float(hf["rms_norm_eps"]),
            rope_theta=float(theta),
            rope_scaling=rope if rope_type == "llama3" else None,
            max_position_embeddings=int(hf["max_position_embeddings"]),
            tie_word_embeddings=bool(hf.get("tie_word_embeddings", False)),
            family=family.name,
            biases=family.biases_of(hf),
        )


def _check_window(family: Family, hf: Mapping[str, Any]) -> None:
    """Refuses a sliding window that a sequence could be longer than."""
    window = None if family.window is None else family.window.size(hf)
    check_window(window, int(hf["max_position_embeddings"]))


def check_window(window: int | None, longest: int) -> None:
    """Raises ValueError for a sliding window of fewer tokens than a sequence may have."""
    if window is not None and window < longest:
        raise ValueError(
            f"sliding_window={window}: attention over a window is not built, and sequences of this "
            f"model may be longer (max_position_embeddings={longest}). Up to {window} tokens a window "
            f"changes nothing: set max_position_embeddings to {window} in config.json if that is enough."
        )


def hf_tensors(model: DecoderConfig) -> list[str]:
    """Names of all tensors in a Hugging Face directory of this model."""
    inside = [name for names in HF_LAYER_TENSORS.values() for name in names]
    inside += [name for linear in model.biases for name in hf_parts(f"{linear}.bias")]
    names = [HF_LAYER.format(i=i) + name for i in range(model.num_layers) for name in inside]
    head = [] if model.tie_word_embeddings else [HF_LM_HEAD]
    return [HF_EMBEDDING, *names, HF_FINAL_NORM, *head]

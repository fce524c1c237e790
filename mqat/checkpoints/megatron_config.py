"""What a training configuration says of a model, in the words of Megatron-Core.

`training_words.py` brings those of Megatron-LM, Megatron-Bridge and NeMo into them. What they say and no
description has is refused by name; which family it is follows from the tensors and these words.

Sources: Megatron-Core `transformer/transformer_config.py`, `transformer/mlp.py`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from mqat.checkpoints.values import is_positive, is_whole
from mqat.errors import UserError
from mqat.models.decoder import FAMILIES, DecoderConfig
from mqat.models.family import Family
from mqat.models.structure import PROJ, QKV, QUERY_NORM, Norm

# Value of a plain decoder, where a key is there at all.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "normalization": ("RMSNorm",), "gated_linear_unit": (True,), "activation_func": ("silu",),
    "position_embedding_type": ("rope",), "rotary_percent": (1,), "softmax_type": ("vanilla",),
    "transformer_block_type": ("pre_ln",), "normalize_attention_scores": (True,),
    "attention_type": ("multihead",), "mcore_gpt": (True,), "mup_width_mult": (1,),
    "mup_embedding_mult": (1,), "mup_output_mult": (1,), "mup_attn_scale_power": (1,),
    "seq_len_interpolation_factor": (1,),
}  # fmt: skip
# Would change what is computed with any value but none, false, zero or an empty one.
_ABSENT = {
    "layernorm_zero_centered_gamma", "rotary_interleaved", "num_moe_experts", "multi_latent_attention",
    "mtp_num_layers", "mtp_hybrid_override_pattern", "window_size", "window_attn_skip_freq",
    "qk_l2_norm", "glu_linear_offset",
    "apply_residual_connection_post_layernorm", "activation_func_clamp_value", "attention_output_gate",
    "no_rope_freq", "experimental_attention_variant", "mrope_section", "is_hybrid_model",
    "heterogeneous_block_specs", "heterogeneous_layers_config_path", "use_mup", "mup_base_hidden_size",
    "mup_base_head_dim", "heterogeneous_layers_config_encoded_json", "hybrid_layer_pattern",
    "hybrid_override_pattern", "retro_add_retriever", "spec", "quant_recipe", "headscale",
    "apply_embedding_scaling", "mcore_customization_config", "attn_logit_softcapping",
    "final_logit_softcapping", "hyena", "use_kitchen", "use_kitchen_attention", "mtp_standalone",
}  # fmt: skip
# What training frameworks call them. Megatron's `gelu` is by tanh where it is fused with its bias.
_ACTIVATIONS = {
    "silu": ("silu",),
    "gelu_tanh": (
        "gelu",
        "geglu",
        "fast-geglu",
        "openai_gelu",
        "openai-gelu",
        "gelu_tanh",
        "fast_gelu",
    ),
    "relu2": ("squared_relu", "squared-relu"),
}
# Compared with a family, where one that is not like Llama has the tensors.
_OF_FAMILIES = (
    "normalization", "layernorm_zero_centered_gamma", "activation_func", "gated_linear_unit",
    "position_embedding_type", "rotary_percent", "rotary_interleaved",
)  # fmt: skip
_BY_SWITCH, _TANH_SWITCHES = ("gelu", "geglu"), ("bias_gelu_fusion", "bias_activation_fusion")
_BY_CONFIG = "mqat import --config-from HF_DIR takes the description of a Hugging Face directory"


@dataclass(frozen=True)
class Stored:
    """What the tensors say of the model.

    Attributes:
        norms: Of a layer, by their names in Megatron.
        biases: Linears of a layer that have one.
        vocab_size: Rows of the embedding, padding included.
        has_head: There is an output layer of its own.
    """

    norms: frozenset[str]
    biases: frozenset[str]
    vocab_size: int
    has_head: bool


@dataclass(frozen=True)
class TrainingConfig:
    """A training configuration in Megatron-Core's words.

    Attributes:
        where: What says so, for messages.
        values: Word -> value.
        spelled: Word -> how it is spelled there, where that differs.
        rope_scaling: As in a description; None: positions are not scaled.
    """

    where: str
    values: Mapping[str, Any]
    spelled: Mapping[str, str] = field(default_factory=dict)
    rope_scaling: dict[str, Any] | None = None

    def describe(self, stored: Stored) -> DecoderConfig:
        """The description of the model.

        Its vocabulary is the whole table: what its training computed with, padding included.

        Raises:
            UserError: A size is missing, something is not honoured, or the tensors say otherwise.
        """
        family = self._other_family(stored)
        others = set() if family is None else {*_OF_FAMILIES}
        if family is not None and family.positions is None and family.rotary_fraction is None:
            others.remove("rotary_percent")
        self._check(others)
        heads = self._whole("num_attention_heads")
        hidden = self._whole("hidden_size")
        sizes: dict[str, Any] = {
            "hidden_size": hidden,
            "intermediate_size": self._whole("ffn_hidden_size"),
            "num_layers": self._whole("num_layers"),
            "num_attention_heads": heads,
            "num_query_groups": self._whole("num_query_groups", heads),
            "head_dim": self._whole("kv_channels", hidden // heads),
            "max_position_embeddings": self._whole("max_position_embeddings"),
        }
        if family is None or family.positions is None:
            sizes |= {
                "rope_theta": self._positive("rotary_base"),
                "rope_scaling": self.rope_scaling,
            }
        if family is not None and family.rotary_fraction is not None:
            sizes["rotary_fraction"] = self._positive("rotary_percent")
        model = DecoderConfig(
            vocab_size=stored.vocab_size,
            **sizes,
            rms_norm_eps=self._positive("layernorm_epsilon"),
            tie_word_embeddings=not stored.has_head,
            family=family_of(self.where, stored) if family is None else family.name,
            biases=_in_order(stored),
        )
        self._check_agrees(stored, model)
        return model

    def _other_family(self, stored: Stored) -> Family | None:
        """The family of a model that differs from Llama in words of `_OF_FAMILIES`; None: of none."""
        says = self.values.get
        words = ("normalization", "gated_linear_unit", "activation_func", "position_embedding_type")
        if any(says(word, "not said") == "not said" for word in words):
            return None
        if says("position_embedding_type") not in ("rope", "learned_absolute"):
            return None
        for family in FAMILIES.values():
            is_dense = family.mixture is None and not family.attention
            if _is_plain(family) or not is_dense or family.scales_embedding:
                continue
            norms = {norm.name for norm in family.norms}
            is_centered = bool(says("layernorm_zero_centered_gamma"))
            if norms != stored.norms or is_centered != family.zero_centered_gamma:
                continue
            if not family.may_have(_in_order(stored)):
                continue
            try:
                self._check_computes(family, family.name)
            except UserError:
                continue
            return family
        return None

    def _check(self, others: Collection[str]) -> None:
        """Refuses what changes the model and is not honoured; `others` has been compared already."""
        for word, value in self.values.items():
            if word in others:
                continue
            allowed = _PLAIN.get(word, ())
            if word in _ABSENT or word in _PLAIN:
                is_off = not value and (word in _ABSENT or word == "seq_len_interpolation_factor")
                if not is_off and value not in allowed:
                    rule = f"must be {allowed[0]!r}" if allowed else "is not supported"
                    raise UserError(f"{self.where}: {self._said(word)}, {rule}.")
        for word in ("normalization", "gated_linear_unit", "position_embedding_type"):
            if word not in self.values:
                raise UserError(
                    f"{self.where}: does not say {self.spelled.get(word, word)}; {_BY_CONFIG}."
                )

    def _check_agrees(self, stored: Stored, model: DecoderConfig) -> None:
        """Refuses a configuration that promises other tensors than there are."""
        says, biases = self.values.get, stored.biases
        told = {
            "share_embeddings_and_output_weights": not stored.has_head,
            "qk_layernorm": QUERY_NORM.name in stored.norms,
            "add_bias_linear": PROJ.name in biases,
            "add_qkv_bias": QKV.name in biases
            and (PROJ.name not in biases or bool(says("add_qkv_bias"))),
        }
        for word, has in told.items():
            if says(word) is not None and bool(says(word)) != has:
                raise UserError(
                    f"{self.where}: {self._said(word)}, but its tensors say otherwise; they belong to "
                    "different models."
                )
        scale = self.values.get("softmax_scale")
        if scale is not None and not math.isclose(scale, model.head_dim**-0.5, rel_tol=1e-6):
            raise UserError(
                f"{self.where}: softmax_scale={scale}, must be None or 1/sqrt({model.head_dim})."
            )

    def check_is(self, model: DecoderConfig, said_by: str) -> None:
        """Refuses a description of another model than this configuration was trained with.

        Raises:
            UserError: Sizes, norms, positions or the activation are others.
        """
        says, family = self.values.get, model.architecture
        heads, hidden = says("num_attention_heads"), says("hidden_size")
        derived = heads and hidden and hidden // heads
        wanted: dict[str, tuple[Any, float]] = {
            "num_layers": (says("num_layers"), model.num_layers),
            "hidden_size": (hidden, model.hidden_size),
            "ffn_hidden_size": (says("ffn_hidden_size"), model.intermediate_size),
            "num_attention_heads": (heads, model.num_attention_heads),
            "num_query_groups": (says("num_query_groups") or heads, model.num_query_groups),
            "kv_channels": (says("kv_channels") or derived, model.head_dim),
            "layernorm_epsilon": (says("layernorm_epsilon"), model.rms_norm_eps),
            "rotary_base": (says("rotary_base"), model.rope_theta),
        }
        if family.positions is not None:  # of which a run's own base says nothing
            del wanted["rotary_base"]
        for word, (value, other) in wanted.items():
            if is_positive(value) and not math.isclose(value, other, rel_tol=1e-6):
                raise self._contradiction(word, f"{word}={other!r}", said_by)
        self._check_computes(family, said_by)
        self._check_positions(model, said_by)

    def _check_computes(self, family: Family, said_by: str) -> None:
        """Refuses a family with other norms, another activation, or another kind of positions."""
        says, gamma = self.values.get, "layernorm_zero_centered_gamma"
        if says("normalization") not in (None, family.normalization):
            raise self._contradiction("normalization", f"norms are {family.normalization}", said_by)
        if gamma in self.values and bool(says(gamma)) != family.zero_centered_gamma:
            raise self._contradiction(
                gamma, f"{family.name} has {gamma}={family.zero_centered_gamma}", said_by
            )
        self._check_activation(family, said_by)
        is_learned, kind = family.positions is not None, says("position_embedding_type")
        if kind is not None and (kind == "learned_absolute") != is_learned:
            told = f"positions are {'learned' if is_learned else 'rotary'}"
            raise self._contradiction("position_embedding_type", told, said_by)
        word, own = "rotary_interleaved", family.is_rotary_interleaved
        if not is_learned and bool(says(word)) != own:
            raise self._contradiction(word, f"{family.name} has {word}={own}", said_by)

    def _check_positions(self, model: DecoderConfig, said_by: str) -> None:
        """Refuses another part of a head that is rotated, or another scaling."""
        says, own = self.values.get, model.rotary_fraction
        if model.architecture.positions is not None:
            return
        fraction, kind = says("rotary_percent"), says("position_embedding_type")
        if is_positive(fraction) and fraction != own:
            raise self._contradiction("rotary_percent", f"rotary_percent={own!r}", said_by)
        scaling = self.rope_scaling or self._interpolation()
        if kind in (None, "rope") and scaling != model.rope_scaling:
            raise UserError(
                f"{self.where}: positions are scaled by {scaling}, but {said_by} says "
                f"{model.rope_scaling}; they are of different models."
            )

    def _check_activation(self, family: Family, said_by: str) -> None:
        """Refuses an activation or a gate that the family does not have."""
        told = f"the activation is {family.activation}"
        is_gated = self.values.get("gated_linear_unit")
        if is_gated is not None and bool(is_gated) != family.is_gated:
            gate = f"{told}, with{'' if family.is_gated else 'out'} a gate"
            raise self._contradiction("gated_linear_unit", gate, said_by)
        word = self.values.get("activation_func", "not said")
        name = self.spelled.get("activation_func") if word is True else word
        if name not in ("not said", *_ACTIVATIONS[family.activation]):
            raise self._contradiction("activation_func", told, said_by)
        by_erf = [key for key in _TANH_SWITCHES if self.values.get(key) is False]
        if name in _BY_SWITCH and by_erf:
            told += (
                " (Megatron's gelu without that fusion is by the error function; say true there if "
            )
            told += "the small difference is meant)"
            raise self._contradiction(by_erf[0], told, said_by)

    def _interpolation(self) -> dict[str, Any] | None:
        """Linear scaling, in the words of a description."""
        factor = self.values.get("seq_len_interpolation_factor")
        if not is_positive(factor) or factor == 1:
            return None
        return {"rope_type": "linear", "factor": float(factor)}

    def _contradiction(self, word: str, other: str, said_by: str) -> UserError:
        return UserError(
            f"{self.where}: {self._said(word)}, but {said_by} says that {other}; they are of different "
            "models."
        )

    def _said(self, word: str) -> str:
        own = self.spelled.get(word, word)
        return f"{own}={self.values.get(own, self.values.get(word))!r}"

    def _whole(self, word: str, default: int | None = None) -> int:
        value = self.values.get(word)
        value = default if value is None else value
        if not is_whole(value, 1):
            raise UserError(
                f"{self.where}: {self.spelled.get(word, word)} is {value!r}, must be an integer of at "
                f"least 1; {_BY_CONFIG}."
            )
        return value

    def _positive(self, word: str) -> float:
        value = self.values.get(word)
        if not is_positive(value):
            raise UserError(
                f"{self.where}: {self.spelled.get(word, word)} is {value!r}, must be a positive number; "
                f"{_BY_CONFIG}."
            )
        return float(value)


def _in_order(stored: Stored) -> tuple[str, ...]:
    known = dict.fromkeys(linear.name for f in FAMILIES.values() for linear in f.linears)
    return tuple(name for name in known if name in stored.biases)


def family_of(where: object, stored: Stored) -> str:
    """The first family with these norms and biases: those that follow compute the same.

    Raises:
        UserError: There is none.
    """
    plain = [family for family in FAMILIES.values() if _is_plain(family)]
    for family in plain:
        norms = {norm.name for norm in family.norms}
        if norms == stored.norms and family.may_have(_in_order(stored)):
            return family.name
    raise UserError(
        f"{where}: no family has norms {sorted(stored.norms)} and biases on {sorted(stored.biases)}; "
        f"known are {', '.join(family.name for family in plain)}. {_BY_CONFIG}."
    )


def _is_plain(family: Family) -> bool:
    """Whether all that a family computes is in `_PLAIN`, norms and biases."""
    rotates_halves = family.positions is None and not family.is_rotary_interleaved
    normalizes = family.normalization == "RMSNorm" and not family.zero_centered_gamma
    is_swiglu = family.activation == "silu" and family.is_gated and family.mixture is None
    return rotates_halves and normalizes and is_swiglu and not family.scales_embedding


def known_norms() -> frozenset[Norm]:
    """Every norm of a layer that a family has; some share a name, under keys of their own."""
    return frozenset(norm for family in FAMILIES.values() for norm in family.norms)

"""The sizes of a decoder of any family, as configurations of Hugging Face and of mqat say them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from typing import Any

from mqat.errors import UserError
from mqat.models.expert_check import check_experts
from mqat.models.experts import MIXTURE_NORM, Router, Selector, expert_linears, in_mixture
from mqat.models.families.chatglm import CHATGLM
from mqat.models.families.gemma import GEMMA
from mqat.models.families.gemma2 import GEMMA2
from mqat.models.families.gemma3 import GEMMA3
from mqat.models.families.glm4_moe import GLM4_MOE
from mqat.models.families.gpt2 import GPT2
from mqat.models.families.llama import LLAMA
from mqat.models.families.mistral import MISTRAL
from mqat.models.families.mixtral import MIXTRAL
from mqat.models.families.nemotron import NEMOTRON
from mqat.models.families.phi3 import PHI3
from mqat.models.families.qwen2 import QWEN2
from mqat.models.families.qwen2_moe import QWEN2_MOE
from mqat.models.families.qwen3 import QWEN3
from mqat.models.families.qwen3_moe import QWEN3_MOE
from mqat.models.families.starcoder2 import STARCODER2
from mqat.models.family import HF_ATTENTION, Family
from mqat.models.hf_keys import experts_to_hf, positions_to_hf
from mqat.models.structure import (
    FC1,
    FC2,
    KEY_NORM,
    MLP_NORM,
    QUERY_NORM,
    Axis,
    Linear,
    Norm,
    Table,
    by_name,
    layer_key,
)

_DENSE = (
    LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA, GEMMA2, GEMMA3, NEMOTRON, STARCODER2, PHI3, GPT2, CHATGLM
)  # fmt: skip
_OF_MIXTURES = (MIXTRAL, QWEN3_MOE, QWEN2_MOE, GLM4_MOE)
FAMILIES = {family.name: family for family in (*_DENSE, *_OF_MIXTURES)}
# Fields that a family may have no keys for.
_ATTENTION = (
    "rotary_fraction", "sliding_window", "windowed_layers", "windowed_rope_theta", "attention_scale",
    "attention_softcap", "logit_softcap",
)  # fmt: skip
# Zero where there are none.
_OF_EXPERTS = (
    "num_experts",
    "experts_per_token",
    "expert_intermediate_size",
    "shared_intermediate_size",
)


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
    biases: tuple[str, ...] = ()  # names of linears
    # What a Hugging Face config.json says of them: `bos_token_id`, `eos_token_id`, `pad_token_id`.
    token_ids: dict[str, int | list[int]] = field(default_factory=dict)
    # Positions and attention. A token of a windowed layer attends to `sliding_window` tokens, itself
    # included; such layers may have a rotary base of their own, which is never scaled.
    rotary_fraction: float = 1.0  # of a head's channels, from the first on
    sliding_window: int | None = None
    windowed_layers: tuple[int, ...] = ()
    windowed_rope_theta: float | None = None
    attention_scale: float | None = None  # of scores; None: 1 / sqrt(head_dim)
    attention_softcap: float | None = None  # scores s become c tanh(s / c)
    logit_softcap: float | None = None
    normalizes_heads: bool = True  # by norms of query and key heads, where the family has them
    # Of mixtures of experts; 0: a dense model.
    num_experts: int = 0
    experts_per_token: int = 0
    expert_intermediate_size: int = 0
    shared_intermediate_size: int = 0  # of all shared experts of a layer together; 0: none
    dense_layers: tuple[int, ...] = ()  # with a dense MLP in the place of experts
    # A token's experts are in so many groups of neighbours, those whose best two scores are largest.
    expert_groups: int = 1
    expert_groups_per_token: int = 1
    expert_weight_scale: float = 1.0  # what a token's weights for its experts are multiplied by
    # Whether a token's weights for its experts add up to one: a softmax over their scores alone.
    normalizes_expert_weights: bool = True
    # Of the load-balancing loss that Hugging Face adds if it is asked for (`output_router_logits`).
    router_aux_loss_coef: float = 0.0

    def __post_init__(self) -> None:
        """Raises ValueError for sizes that no layout can make work, and biases that none has."""
        if self.family not in FAMILIES:
            raise UserError(f"model.family={self.family!r}: must be one of {', '.join(FAMILIES)}.")
        object.__setattr__(self, "biases", tuple(self.biases))  # a list where it comes from JSON
        self.architecture.switches_of(self.biases)
        for size in fields(self):
            value = getattr(self, size.name)
            if size.name in _OF_EXPERTS and value == 0:
                continue
            if isinstance(value, int) and not isinstance(value, bool) and value < 1:
                raise UserError(f"model.{size.name}={value}: must be at least 1.")
        for name in ("windowed_layers", "dense_layers"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # likewise
        self._check_positions()
        check_experts(self)
        if self.num_attention_heads % self.num_query_groups:
            raise UserError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_query_groups={self.num_query_groups} (num_key_value_heads in Hugging Face)."
            )

    def _check_positions(self) -> None:
        """Refuses what no attention can compute, and what the family has no keys for."""
        family, layers = self.architecture, self.windowed_layers
        is_odd = self.rotary_channels % 2 or self.rotary_channels < 2
        if is_odd and family.positions is None:
            raise UserError(
                f"head_dim={self.head_dim}, of which {self.rotary_fraction:g} are rotated: rotary "
                f"positions turn pairs; {self.rotary_channels} channels must be even, and some."
            )
        wrong = any(not 0 <= layer < self.num_layers for layer in layers)
        if wrong or sorted(set(layers)) != [*layers] or bool(layers) != bool(self.sliding_window):
            raise UserError(
                f"model.windowed_layers={[*layers]}, sliding_window={self.sliding_window}: must be "
                f"increasing numbers of {self.num_layers} layers where there is a window, else none."
            )
        if self.windowed_rope_theta is not None and not layers:
            raise UserError("model.windowed_rope_theta: no layer has a window.")
        scalar = self.score_scale**-2
        is_whole = math.isclose(scalar, round(scalar), rel_tol=1e-6)
        if "query_pre_attn_scalar" in family.attention and not is_whole:
            raise UserError(
                f"model.attention_scale={self.attention_scale}: its power of -2 is {scalar:g}, but "
                f"query_pre_attn_scalar of a {family.name} model must be a whole number."
            )
        self._check_windowed_base()
        if wanted := self._unsaid(family) or self._fixed(family):
            raise UserError(
                f"model.{wanted}={getattr(self, wanted)!r}: the config.json of a {family.name} model "
                "cannot say that."
            )

    def _check_windowed_base(self) -> None:
        """Refuses scalings that would reach windowed layers, or in Hugging Face would not."""
        kind, base = (self.rope_scaling or {}).get("rope_type"), self.windowed_rope_theta
        if base is not None and kind in ("yarn", "longrope"):
            raise UserError(
                f"model.windowed_rope_theta={base:g} with rope_scaling of type {kind!r}: its factor of "
                "attention would reach windowed layers, which are never scaled; supported there are "
                "linear, dynamic and llama3."
            )
        has_own = "rope_local_base_freq" in self.architecture.attention
        if has_own and self.windowed_layers and base is None and kind is not None:
            raise UserError(
                f"model.rope_scaling of type {kind!r} without windowed_rope_theta: windowed layers of a "
                f"{self.family} model are never scaled; state their base."
            )

    def _fixed(self, family: Family) -> str | None:
        """A field for which a family's config.json has no key, with another value than it means."""
        means: dict[str, tuple[str, Any]] = {
            "num_key_value_heads": ("num_query_groups", self.num_attention_heads),
            "head_dim": ("head_dim", self.hidden_size // self.num_attention_heads),
            "rope_theta": ("rope_theta", family.rope_theta),
            "rope_scaling": ("rope_scaling", None),
            "partial_rotary_factor": ("rotary_fraction", family.rotary_fraction or 1.0),
        }
        for key, (name, value) in means.items():
            if family.hf_keys.get(key, key) is None and getattr(self, name) != value:
                return name
        return None

    def _unsaid(self, family: Family) -> str | None:
        """A field of positions and attention that a family's config.json has no keys for."""
        said = {HF_ATTENTION[key] for key in family.attention}
        if family.rotary_fraction is not None:
            said.add("rotary_fraction")
        if family.window is not None:
            every = not self.windowed_layers or len(self.windowed_layers) == self.num_layers
            said |= {"sliding_window"}
            said |= {"windowed_layers"} if every or not family.window.is_of_all_layers else set()
        plain = {known.name: known.default for known in fields(self)}
        return next((f for f in _ATTENTION if f not in said and getattr(self, f) != plain[f]), None)

    @property
    def rotary_channels(self) -> int:
        """Of each head; the others are not rotated."""
        return int(self.head_dim * self.rotary_fraction)

    @property
    def score_scale(self) -> float:
        """What scores are multiplied by."""
        return self.attention_scale or 1.0 / math.sqrt(self.head_dim)

    @property
    def architecture(self) -> Family:
        """What the family says of every model of it."""
        return FAMILIES[self.family]

    @property
    def limits_groups(self) -> bool:
        """Whether a token's experts are in some groups only."""
        return self.expert_groups_per_token < self.expert_groups

    @property
    def linears(self) -> tuple[Linear, ...]:
        """Of all kinds of layers, in the order of the forward pass; those of experts one by one."""
        return tuple(self._linears_by_name().values())

    def has_experts(self, layer: int) -> bool:
        """Whether a layer has experts in the place of a dense MLP."""
        return self.num_experts > 0 and layer not in self.dense_layers

    def linears_of(self, layer: int) -> tuple[Linear, ...]:
        """Of one layer, likewise."""
        if not self.dense_layers:
            return self.linears
        dense, has_experts = (FC1.name, FC2.name), self.has_experts(layer)
        return tuple(
            x for x in self.linears if not (x.name in dense if has_experts else in_mixture(x))
        )

    def _linears_by_name(self) -> dict[str, Linear]:
        return _linears_by_name(self.family, self.num_experts, bool(self.dense_layers))

    @property
    def router(self) -> Router | None:
        """Of every layer with experts; None: there are none."""
        mixture = self.architecture.mixture
        return None if mixture is None else mixture.experts.router

    def selectors_of(self, layer: int) -> tuple[Selector, ...]:
        """What chooses and weighs a layer's experts."""
        return self.architecture.selectors if self.has_experts(layer) else ()

    @property
    def norms(self) -> tuple[Norm, ...]:
        """Of every layer; of those with experts, where they differ (by their keys)."""
        norms = self.architecture.norms
        heads = () if self.normalizes_heads else (QUERY_NORM, KEY_NORM)
        return tuple(norm for norm in norms if norm not in heads)

    def norms_of(self, layer: int) -> tuple[Norm, ...]:
        """Of one layer."""
        if self.num_experts == 0 or self.has_experts(layer):
            return self.norms
        return tuple(MLP_NORM if norm == MIXTURE_NORM else norm for norm in self.norms)

    def place(self, key: str, layer: int) -> tuple[str, tuple[slice, ...]]:
        """Where checkpoints hold a layer's part of what is `key` in the table: key, leading indices.

        Megatron stacks layers in one tensor, unless they differ; then each has keys of its own.
        """
        if self.dense_layers:
            return layer_key(layer, key), ()
        return key, (slice(layer, layer + 1),)

    @property
    def tables(self) -> tuple[Table, ...]:
        """In the order of the forward pass; a tied head has none of its own."""
        tables = self.architecture.tables
        return tables[:-1] if self.tie_word_embeddings else tables

    @property
    def embedding_scale(self) -> float:
        """What the embedding is multiplied by, before it is rounded to the model's dtype."""
        return math.sqrt(self.hidden_size) if self.architecture.scales_embedding else 1.0

    def linear(self, name: str) -> Linear:
        """The linear of a name in a layer.

        Raises:
            UserError: This model has none of that name; says which it has.
        """
        known = self._linears_by_name()
        if name not in known:
            raise UserError(f"{name}: not a linear of this model; known are {list(known)[:16]}.")
        return known[name]

    def size(self, axis: Axis) -> int:
        """Global size of a named axis, before any parallel split."""
        sizes: dict[Axis, int] = {
            "hidden": self.hidden_size,
            "intermediate": self.intermediate_size,
            "query": self.num_attention_heads * self.head_dim,
            "key_value": self.num_query_groups * self.head_dim,
            "head": self.head_dim,
            "vocab": self.vocab_size,
            "positions": self.max_position_embeddings,
            "experts": self.num_experts,
            "expert_intermediate": self.expert_intermediate_size,
            "shared_intermediate": self.shared_intermediate_size,
            "one": 1,
        }
        return sizes[axis]

    def linear_shape(self, name: str) -> tuple[int, int]:
        """Global (out_features, in_features) of a linear, by its name in a layer."""
        return self.linear(name).shape(self)

    def checkpoint_shapes(self) -> dict[str, tuple[int, ...]]:
        """Global shape of every weight in a checkpoint; vocabulary tables may have more rows.

        Megatron stacks layers that are alike in one tensor, whose first dimension is the layer.
        """
        first, *others = self.tables
        shapes: dict[str, tuple[int, ...]] = {first.key: (self.size(first.rows), self.hidden_size)}
        shapes |= self._norm_shapes(self.architecture.final_norm)
        shapes |= {table.key: (self.size(table.rows), self.hidden_size) for table in others}
        if not self.dense_layers:
            of_layers = self._layer_shapes(0).items()
            return shapes | {key: (self.num_layers, *shape) for key, shape in of_layers}
        for layer in range(self.num_layers):
            of_layers = self._layer_shapes(layer).items()
            shapes |= {layer_key(layer, key): shape for key, shape in of_layers}
        return shapes

    def _layer_shapes(self, layer: int) -> dict[str, tuple[int, ...]]:
        """Key in the table -> shape of a layer's part."""
        shapes: dict[str, tuple[int, ...]] = {}
        for linear in self.linears_of(layer):
            shapes[linear.key] = linear.stored_shape(self)
            if linear.name in self.biases:
                shapes[linear.bias_key] = shapes[linear.key][:-1]
        for norm in self.norms_of(layer):
            shapes |= self._norm_shapes(norm)
        return shapes | {x.key: self.selector_shape(x) for x in self.selectors_of(layer)}

    def selector_shape(self, selector: Selector) -> tuple[int, ...]:
        """Of a router's weight, and what is beside it."""
        return tuple(self.size(axis) for axis in selector.axes)

    def _norm_shapes(self, norm: Norm) -> dict[str, tuple[int, ...]]:
        keys = {"weight": norm.key, "bias": norm.bias_key}
        return {keys[kind]: (self.size(norm.size),) for kind in self.architecture.norm_kinds}

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe form, as stored in `mqat.json`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DecoderConfig:
        """Inverse of `to_dict`; an unknown or missing key is a ValueError."""
        known = {known.name for known in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise UserError(f"model: unknown keys {unknown}; known keys are {sorted(known)}.")
        try:
            return cls(**values)
        except TypeError as error:
            raise UserError(f"model: {error}.") from error

    def to_hf(self, dtype: str) -> dict[str, Any]:
        """The Hugging Face `config.json` object, in the spelling that transformers 4 and 5 read.

        Args:
            dtype: Of unquantized tensors, such as `bfloat16`.
        """
        family = self.architecture
        values = {
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_query_groups,
            "head_dim": self.head_dim,
            "hidden_act": family.hf_activations[0],
            "rms_norm_eps": self.rms_norm_eps,
            "max_position_embeddings": self.max_position_embeddings,
            **positions_to_hf(self),
        }
        own = ((family.hf_keys.get(key, key), value) for key, value in values.items())
        return {
            "architectures": [family.hf_architecture],
            "model_type": family.name,
            "torch_dtype": dtype,
            **{key: value for key, value in own if key is not None},
            **family.switches_of(self.biases),
            **family.hf_extra,
            **experts_to_hf(self),
            "tie_word_embeddings": self.tie_word_embeddings,
            "use_cache": True,
            **self.token_ids,
        }


@cache
def _linears_by_name(family: str, num_experts: int, has_dense: bool) -> dict[str, Linear]:
    """The linears of a layer; a model may have hundreds of experts and be asked thousands of times."""
    mixture = FAMILIES[family].mixture
    experts = () if mixture is None else expert_linears(mixture.experts, num_experts)
    dense = (FC1, FC2) if has_dense else ()
    return by_name((*FAMILIES[family].linears, *dense, *experts))

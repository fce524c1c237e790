"""The sizes of a decoder of any family, as configurations of Hugging Face and of mqat say them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from typing import Any

from mqat.errors import UserError
from mqat.models.families.llama import LLAMA
from mqat.models.families.mistral import MISTRAL
from mqat.models.families.mixtral import MIXTRAL
from mqat.models.families.qwen2 import QWEN2
from mqat.models.families.qwen3 import QWEN3
from mqat.models.families.qwen3_moe import QWEN3_MOE
from mqat.models.structure import (
    EMBEDDING,
    FINAL_NORM,
    HF_LAYER,
    OUTPUT_LAYER,
    Axis,
    Linear,
    Norm,
    Router,
    by_name,
    expert_linears,
)

FAMILIES = {family.name: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3, MIXTRAL, QWEN3_MOE)}

_OF_EXPERTS = ("num_experts", "experts_per_token", "expert_intermediate_size")


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
    # Of mixtures of experts; 0: a dense model.
    num_experts: int = 0
    experts_per_token: int = 0
    expert_intermediate_size: int = 0
    # Whether a token's weights for its experts add up to one: a softmax over their scores alone.
    normalizes_expert_weights: bool = True
    # Of the load-balancing loss that Hugging Face adds if it is asked for (`output_router_logits`).
    router_aux_loss_coef: float = 0.0

    def __post_init__(self) -> None:
        """Raises ValueError for sizes that no layout can make work, and biases that none has."""
        if self.family not in FAMILIES:
            raise UserError(f"model.family={self.family!r}: must be one of {', '.join(FAMILIES)}.")
        object.__setattr__(self, "biases", tuple(self.biases))  # a list where it comes from JSON
        FAMILIES[self.family].switches_of(self.biases)
        for size in fields(self):
            value = getattr(self, size.name)
            if size.name in _OF_EXPERTS and self.num_experts == value == 0:
                continue
            if isinstance(value, int) and not isinstance(value, bool) and value < 1:
                raise UserError(f"model.{size.name}={value}: must be at least 1.")
        if self.head_dim % 2:
            raise UserError(
                f"head_dim={self.head_dim}: rotary positions turn pairs; it must be even."
            )
        self._check_experts()
        if self.num_attention_heads % self.num_query_groups:
            raise UserError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_query_groups={self.num_query_groups} (num_key_value_heads in Hugging Face)."
            )

    def _check_experts(self) -> None:
        has_experts = FAMILIES[self.family].mixture is not None
        if has_experts != bool(self.num_experts):
            raise UserError(
                f"num_experts={self.num_experts}: a {self.family} model has "
                f"{'experts in every layer' if has_experts else 'none'}."
            )
        if self.experts_per_token > self.num_experts:
            raise UserError(
                f"experts_per_token={self.experts_per_token} of num_experts={self.num_experts}: a token "
                "cannot go to more experts than there are."
            )
        if self.experts_per_token == 1 and self.normalizes_expert_weights:
            raise UserError(
                "experts_per_token=1 with normalized weights: the one expert's weight is always 1, so "
                "the router could not learn, and Megatron-Core refuses it."
            )

    @property
    def linears(self) -> tuple[Linear, ...]:
        """Of every layer, in the order of the forward pass; those of experts one by one."""
        return tuple(_linears_by_name(self.family, self.num_experts).values())

    @property
    def router(self) -> Router | None:
        """Of every layer; None: there are no experts."""
        mixture = FAMILIES[self.family].mixture
        return None if mixture is None else mixture.experts.router

    @property
    def norms(self) -> tuple[Norm, ...]:
        """Of every layer."""
        return FAMILIES[self.family].norms

    def linear(self, name: str) -> Linear:
        """The linear of a name in a layer.

        Raises:
            UserError: This model has none of that name; says which it has.
        """
        known = _linears_by_name(self.family, self.num_experts)
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
            "experts": self.num_experts,
            "expert_intermediate": self.expert_intermediate_size,
        }
        return sizes[axis]

    def linear_shape(self, name: str) -> tuple[int, int]:
        """Global (out_features, in_features) of a linear, by its name in a layer."""
        return self.linear(name).shape(self)

    def checkpoint_shapes(self) -> dict[str, tuple[int, ...]]:
        """Global shape of every weight in a checkpoint; vocabulary tables may have more rows.

        Megatron stacks the layers of a model in one tensor, whose first dimension is the layer.
        """
        table = (self.vocab_size, self.hidden_size)
        shapes: dict[str, tuple[int, ...]] = {
            EMBEDDING.key: table,
            FINAL_NORM.key: (self.size(FINAL_NORM.size),),
        }
        if not self.tie_word_embeddings:
            shapes[OUTPUT_LAYER.key] = table
        for linear in self.linears:
            shapes[linear.key] = linear.stacked_shape(self, self.num_layers)
            if linear.name in self.biases:
                shapes[linear.bias_key] = shapes[linear.key][:-1]
        if self.router is not None:
            shapes[self.router.key] = (self.num_layers, self.num_experts, self.hidden_size)
        return shapes | {norm.key: (self.num_layers, self.size(norm.size)) for norm in self.norms}

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
        family = FAMILIES[self.family]
        mixture, of_experts = family.mixture, dict[str, Any]()
        if mixture is not None:
            of_experts = {
                mixture.count: self.num_experts,
                "num_experts_per_tok": self.experts_per_token,
                mixture.size: self.expert_intermediate_size,
                "router_aux_loss_coef": self.router_aux_loss_coef,
                **mixture.is_everywhere,
            }
            if mixture.normalizes is not None:
                of_experts[mixture.normalizes] = self.normalizes_expert_weights
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
            **of_experts,
            "tie_word_embeddings": self.tie_word_embeddings,
            "use_cache": True,
            **self.token_ids,
        }


@cache
def _linears_by_name(family: str, num_experts: int) -> dict[str, Linear]:
    """The linears of a layer; a model may have hundreds of experts and be asked thousands of times."""
    mixture = FAMILIES[family].mixture
    experts = () if mixture is None else expert_linears(mixture.experts, num_experts)
    return by_name((*FAMILIES[family].linears, *experts))


def check_window(window: int | None, longest: int) -> None:
    """Raises ValueError for a sliding window of fewer tokens than a sequence may have."""
    if window is not None and window < longest:
        raise UserError(
            f"sliding_window={window}: attention over a window is not built, and sequences of this "
            f"model may be longer (max_position_embeddings={longest}). Up to {window} tokens a window "
            f"changes nothing: set max_position_embeddings to {window} in config.json if that is enough."
        )


def hf_shapes(model: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in a Hugging Face directory of this model, in model order."""
    table = (model.vocab_size, model.hidden_size)
    in_layer: dict[str, tuple[int, ...]] = {
        f"{norm.hf}.weight": (model.size(norm.size),) for norm in model.norms
    }
    for linear in model.linears:
        for part in linear.parts:
            rows = model.size(part.rows)
            in_layer[f"{part.hf}.weight"] = (rows, model.size(linear.columns))
            if linear.name in model.biases:
                in_layer[f"{part.hf}.bias"] = (rows,)
    if model.router is not None:
        in_layer[f"{model.router.hf}.weight"] = (model.num_experts, model.hidden_size)
    shapes: dict[str, tuple[int, ...]] = {f"{EMBEDDING.hf}.weight": table}
    for layer in range(model.num_layers):
        prefix = HF_LAYER.format(i=layer)
        shapes |= {prefix + name: shape for name, shape in in_layer.items()}
    shapes[f"{FINAL_NORM.hf}.weight"] = (model.size(FINAL_NORM.size),)
    if not model.tie_word_embeddings:
        shapes[f"{OUTPUT_LAYER.hf}.weight"] = table
    return shapes

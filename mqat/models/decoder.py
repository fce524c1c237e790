"""The sizes of a decoder of any family, as configurations of Hugging Face and of mqat say them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from typing import Any

from mqat.errors import UserError
from mqat.models.families.chatglm import CHATGLM
from mqat.models.families.gemma import GEMMA
from mqat.models.families.gemma2 import GEMMA2
from mqat.models.families.gemma3 import GEMMA3
from mqat.models.families.gpt2 import GPT2
from mqat.models.families.llama import LLAMA
from mqat.models.families.mistral import MISTRAL
from mqat.models.families.mixtral import MIXTRAL
from mqat.models.families.nemotron import NEMOTRON
from mqat.models.families.phi3 import PHI3
from mqat.models.families.qwen2 import QWEN2
from mqat.models.families.qwen3 import QWEN3
from mqat.models.families.qwen3_moe import QWEN3_MOE
from mqat.models.families.starcoder2 import STARCODER2
from mqat.models.family import HF_ATTENTION, Family
from mqat.models.structure import Axis, Linear, Norm, Router, Table, by_name, expert_linears

_DENSE = (
    LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA, GEMMA2, GEMMA3, NEMOTRON, STARCODER2, PHI3, GPT2, CHATGLM
)  # fmt: skip
_OF_MIXTURES = (MIXTRAL, QWEN3_MOE)
FAMILIES = {family.name: family for family in (*_DENSE, *_OF_MIXTURES)}
# Fields that a family may have no keys for.
_ATTENTION = (
    "rotary_fraction", "sliding_window", "windowed_layers", "windowed_rope_theta", "attention_scale",
    "attention_softcap", "logit_softcap",
)  # fmt: skip
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
    # Positions and attention. A token of a windowed layer attends to `sliding_window` tokens, itself
    # included; such layers may have a rotary base of their own, which is never scaled.
    rotary_fraction: float = 1.0  # of a head's channels, from the first on
    sliding_window: int | None = None
    windowed_layers: tuple[int, ...] = ()
    windowed_rope_theta: float | None = None
    attention_scale: float | None = None  # of scores; None: 1 / sqrt(head_dim)
    attention_softcap: float | None = None  # scores s become c tanh(s / c)
    logit_softcap: float | None = None
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
        self.architecture.switches_of(self.biases)
        for size in fields(self):
            value = getattr(self, size.name)
            if size.name in _OF_EXPERTS and self.num_experts == value == 0:
                continue
            if isinstance(value, int) and not isinstance(value, bool) and value < 1:
                raise UserError(f"model.{size.name}={value}: must be at least 1.")
        object.__setattr__(self, "windowed_layers", tuple(self.windowed_layers))  # likewise
        self._check_positions()
        self._check_experts()
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

    def _check_experts(self) -> None:
        has_experts = self.architecture.mixture is not None
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
        mixture = self.architecture.mixture
        is_said = mixture is not None and mixture.normalizes is not None
        if has_experts and not is_said and not self.normalizes_expert_weights:
            raise UserError(
                f"normalizes_expert_weights=False: the weights of a token's experts add up to one in "
                f"every {self.family} model; its config.json has no key that says otherwise."
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
        mixture = self.architecture.mixture
        return None if mixture is None else mixture.experts.router

    @property
    def norms(self) -> tuple[Norm, ...]:
        """Of every layer."""
        return self.architecture.norms

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
            "positions": self.max_position_embeddings,
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
        first, *others = self.tables
        shapes: dict[str, tuple[int, ...]] = {first.key: (self.size(first.rows), self.hidden_size)}
        shapes |= self._norm_shapes(self.architecture.final_norm, ())
        shapes |= {table.key: (self.size(table.rows), self.hidden_size) for table in others}
        for linear in self.linears:
            shapes[linear.key] = linear.stacked_shape(self, self.num_layers)
            if linear.name in self.biases:
                shapes[linear.bias_key] = shapes[linear.key][:-1]
        for norm in self.norms:
            shapes |= self._norm_shapes(norm, (self.num_layers,))
        if self.router is not None:
            shapes[self.router.key] = (self.num_layers, self.num_experts, self.hidden_size)
        return shapes

    def _norm_shapes(self, norm: Norm, lead: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        keys = {"weight": norm.key, "bias": norm.bias_key}
        kinds = self.architecture.norm_kinds
        return {keys[kind]: (*lead, self.size(norm.size)) for kind in kinds}

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
            **self.positions_to_hf(),
        }
        own = ((family.hf_keys.get(key, key), value) for key, value in values.items())
        return {
            "architectures": [family.hf_architecture],
            "model_type": family.name,
            "torch_dtype": dtype,
            **{key: value for key, value in own if key is not None},
            **family.switches_of(self.biases),
            **family.hf_extra,
            **of_experts,
            "tie_word_embeddings": self.tie_word_embeddings,
            "use_cache": True,
            **self.token_ids,
        }

    def positions_to_hf(self) -> dict[str, Any]:
        """Keys of positions and attention."""
        family, window = self.architecture, self.architecture.window
        scaling = self.rope_scaling
        keys: dict[str, Any] = {"rope_theta": self.rope_theta, "rope_scaling": scaling}
        if scaling is not None and scaling["rope_type"] == "longrope":
            name = "original_max_position_embeddings"  # transformers 4 reads it here
            keys[name] = scaling[name]
            if family.rope_scalings is not None:  # of whose class it wants these three keys alone
                others = {key: v for key, v in scaling.items() if key not in ("rope_type", name)}
                keys["rope_scaling"] = {"type": "longrope", **others}
        if family.rotary_fraction is not None:
            keys["partial_rotary_factor"] = self.rotary_fraction
        if window is not None:
            # transformers makes masks of both kinds where there is a pattern.
            least = None if window.every is None else window.default
            keys["sliding_window"] = self.sliding_window or least
            if window.switch is not None:
                keys[window.switch] = self.sliding_window is not None
            has_pattern = window.every is not None or self.sliding_window is not None
            if has_pattern and not window.is_of_all_layers:
                keys["layer_types"] = [
                    ("sliding" if layer in self.windowed_layers else "full") + "_attention"
                    for layer in range(self.num_layers)
                ]
            if self.sliding_window is not None and window.first_layer is not None:
                keys[window.first_layer[0]] = self.windowed_layers[0]
        for key in family.attention:
            keys[key] = getattr(self, HF_ATTENTION[key])
            if key == "query_pre_attn_scalar":
                keys[key] = round(self.score_scale**-2)
            elif key == "rope_local_base_freq" and keys[key] is None:  # it has no null
                keys[key] = self.rope_theta
        return keys


@cache
def _linears_by_name(family: str, num_experts: int) -> dict[str, Linear]:
    """The linears of a layer; a model may have hundreds of experts and be asked thousands of times."""
    mixture = FAMILIES[family].mixture
    experts = () if mixture is None else expert_linears(mixture.experts, num_experts)
    return by_name((*FAMILIES[family].linears, *experts))


def hf_shapes(model: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in a Hugging Face directory of this model, in model order."""
    family = model.architecture
    in_layer: dict[str, tuple[int, ...]] = {
        f"{norm.hf}.{kind}": (model.size(norm.size),)
        for norm in model.norms
        for kind in family.norm_kinds
    }
    for linear in model.linears:
        for module, parts in linear.hf_modules().items():
            rows, columns = linear.rows_of(model, parts), model.size(linear.columns)
            weight = (columns, rows) if linear.is_transposed_in_hf else (rows, columns)
            in_layer[f"{module}.weight"] = weight
            if linear.name in model.biases:
                in_layer[f"{module}.bias"] = (rows,)
    if model.router is not None:
        in_layer[f"{model.router.hf}.weight"] = (model.num_experts, model.hidden_size)
    tables: dict[str, tuple[int, ...]] = {
        f"{table.hf}.weight": (model.size(table.rows), model.hidden_size) for table in model.tables
    }
    head = f"{family.output_layer.hf}.weight"
    shapes = {name: shape for name, shape in tables.items() if name != head}
    for layer in range(model.num_layers):
        prefix = family.hf_layer.format(i=layer)
        shapes |= {prefix + name: shape for name, shape in in_layer.items()}
    last = family.final_norm
    shapes |= {f"{last.hf}.{kind}": (model.size(last.size),) for kind in family.norm_kinds}
    return shapes | tables  # the head, where it is another table, comes last

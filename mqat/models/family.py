"""What tells one family of decoders from another, as data.

A further family is a further file in `families/` like `qwen2.py`, its name in `decoder.FAMILIES`, and,
as a second opinion, a file in `verify/facts/`. What a family computes is said in columns, and code asks
for these, never for the family's name.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from mqat.errors import UserError
from mqat.models.experts import Experts, Selector
from mqat.models.structure import (
    CORE_ATTENTION,
    DENSE_LINEARS,
    DENSE_NORMS,
    EMBEDDING,
    FC1,
    FINAL_NORM,
    HF_LAYER,
    OUTPUT_LAYER,
    QKV,
    Cache,
    Linear,
    Norm,
    Table,
    by_name,
)

# `gelu_tanh`: 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))); `relu2`: max(x, 0)^2.
Activation = Literal["silu", "gelu_tanh", "relu2"]

# Key of a Hugging Face `config.json` -> field of `DecoderConfig`.
HF_ATTENTION = {
    "query_pre_attn_scalar": "attention_scale",  # to the power of -1/2
    "attn_logit_softcapping": "attention_softcap",
    "final_logit_softcapping": "logit_softcap",
    "rope_local_base_freq": "windowed_rope_theta",
}


@dataclass(frozen=True)
class SlidingWindow:
    """How a Hugging Face `config.json` says that tokens attend to near ones only.

    Attributes:
        default: Value of `sliding_window` where the key is absent; None: no window.
        switch: Key that turns it on, false where absent; None: it is always on.
        first_layer: Key of the first layer that has it, with its value where absent.
        every: Key, if any, and value where absent of a number n: each n-th layer has none.

    `layer_types` goes before `first_layer` and `every`; without these, all layers have the window.
    """

    default: int | None
    switch: str | None = None
    first_layer: tuple[str, int] | None = None
    every: tuple[str | None, int] | None = None

    @property
    def is_of_all_layers(self) -> bool:
        """Whether no key can take it from a layer."""
        return self.first_layer is None and self.every is None


@dataclass(frozen=True)
class DenseLayers:
    """How a Hugging Face `config.json` says which layers have a dense MLP in the place of experts.

    Attributes:
        listed: Key of their numbers; with
        step: key of a number n, 1 where absent: only each n-th layer has experts. It is written as 1.
        first: Key of how many of the first layers they are.
    """

    listed: str | None = None
    step: str | None = None
    first: str | None = None

    @property
    def keys(self) -> tuple[str, ...]:
        """Those that are read."""
        return tuple(key for key in (self.listed, self.step, self.first) if key is not None)

    def to_hf(self, layers: tuple[int, ...]) -> dict[str, Any]:
        """The keys that say so."""
        if self.first is not None:
            return {self.first: len(layers)}
        assert self.listed is not None and self.step is not None, "there is one way or the other"
        return {self.listed: [*layers], self.step: 1}


@dataclass(frozen=True)
class Mixture:
    """The experts of a family, and how a Hugging Face `config.json` describes them.

    Attributes:
        experts: Their names.
        count: Key of their number.
        size: Key of their intermediate size.
        gguf_size: The same in a file of llama.cpp, which makes the weights of a token's experts add up
            to one whatever the model says.
        normalizes: Key that says whether a token's weights for its experts add up to one; None: they
            always do.
        scores: What becomes of the router's output: a softmax over experts, or a sigmoid of each, whose
            weights always add up to one (before `scaling`).
        scaling: Key of what these weights are multiplied by; None: nothing.
        groups: Keys of how many groups of neighbours experts are in, and in how many of these, those
            whose best two scores are largest, a token's experts are; None: there are no groups.
        shared_size: Key of the intermediate size of shared experts, or
        shared_count: of their number, each of `size`.
        dense: Which layers have none; None: all have some.
    """

    experts: Experts
    count: str
    size: str
    normalizes: str | None = None
    gguf_size: str = "feed_forward_length"
    scores: Literal["softmax", "sigmoid"] = "softmax"
    scaling: str | None = None
    groups: tuple[str, str] | None = None
    shared_size: str | None = None
    shared_count: str | None = None
    dense: DenseLayers | None = None

    @property
    def keys(self) -> tuple[str, ...]:
        """All of `config.json` above."""
        told = (
            self.count,
            self.size,
            self.normalizes,
            self.scaling,
            self.shared_size,
            self.shared_count,
        )
        return (
            *(key for key in told if key is not None),
            *(self.groups or ()),
            *(() if self.dense is None else self.dense.keys),
        )


@dataclass(frozen=True)
class Family:
    """Names of a family, and which of its linears have biases.

    Attributes:
        name: `model_type` of Hugging Face.
        hf_architecture: Class there.
        gguf_architecture: `general.architecture` of llama.cpp; None: not read from its files.
        is_interleaved_in_gguf: llama.cpp stores query and key rows with the halves of a head
            interleaved.
        trtllm_architecture: Of TensorRT-LLM's `config.json`.
        decoder_types: Values of `decoder_type` that mean it, as in NeMo and ModelOpt.
        linears: Of every layer, in the order of the forward pass; without those of experts.
        norms: Of every layer; of those with experts, where others have a dense MLP.
        head_norms_switch: Key of the Hugging Face `config.json` without which, or where it is false,
            there are none of query and key heads; None: `norms` says it.
        final_norm: The last one of the model.
        embedding: Table of the vocabulary.
        output_layer: The same, for the logits.
        cache: Of keys and values.
        positions: Table of learned positions; None: rotary ones.
        normalization: What all norms compute, in Megatron's word; LayerNorm has biases.
        zero_centered_gamma: Norms multiply by 1 + weight.
        activation: Of the MLP; gated where `FC1` has two parts.
        scales_embedding: Hidden states begin as sqrt(hidden_size) times the embedding.
        biased: Names of linears that always have a bias.
        bias_switches: Key of the Hugging Face `config.json` -> names of linears that it gives biases.
        head_dim_is_stated: transformers has a default of its own for `head_dim`.
        window: How a sliding window is declared; None: there is none.
        rope_theta: Rotary base where it is absent.
        rope_scalings: Kinds that its class in transformers takes; None: all.
        rotary_fraction: Of a head's channels that are rotated, where `partial_rotary_factor` is absent;
            None: always all.
        is_rotary_interleaved: Neighbouring channels are rotated against each other, not halves.
        attention: Keys of `HF_ATTENTION` that its `config.json` has, with their values where absent.
        hf_layer: Prefix of a layer's tensors there, with its number as `{i}`.
        hf_base: What some files leave out before all names but the head's.
        hf_further_layers: Key of the number of layers after the last one, of heads that predict several
            tokens, which are left out; None: there are none.
        hf_buffers: Ends of names that are no weights: what is computed from config.json.
        hf_keys: Key of Llama's `config.json` -> this family's; None: it has none.
        hf_defaults: What an absent key (of this family) means.
        inner_factor: An MLP whose width is null is so many times as wide as the model; 0: none is.
        may_omit_groups: Without a number of key/value heads there are as many as query heads.
        hf_activations: What it calls the activation; the first is written.
        hf_harmless: Further keys that change nothing here.
        mixture: In the place of a dense MLP, in all layers or some; None: there is none.
        hf_extra: Further keys of the Hugging Face `config.json`, which have no other value.
        hf_fixed: The same, but that need not be there and are not written.
        trtllm_activation: What TensorRT-LLM calls the activation.
        trtllm_biases: Key of its `config.json` -> linear whose biases it stands for.
        trtllm_attention: Of the keys of windows and of `attention`, those that it has, too.
        trtllm_fraction: Its key for the part of a head that is rotated; None: always all.
        trtllm_states_head: Its class takes heads of any size; otherwise of hidden_size / heads.
        trtllm_expert_size: Its key for the intermediate size of experts, where that is not that of MLPs.
        trtllm_extra: Further keys of TensorRT-LLM's.
    """

    name: str
    hf_architecture: str
    gguf_architecture: str | None
    is_interleaved_in_gguf: bool
    trtllm_architecture: str | None
    decoder_types: tuple[str, ...]
    linears: tuple[Linear, ...] = DENSE_LINEARS
    norms: tuple[Norm, ...] = DENSE_NORMS
    head_norms_switch: str | None = None
    final_norm: Norm = FINAL_NORM
    embedding: Table = EMBEDDING
    output_layer: Table = OUTPUT_LAYER
    cache: Cache = CORE_ATTENTION
    positions: Table | None = None
    normalization: Literal["RMSNorm", "LayerNorm"] = "RMSNorm"
    zero_centered_gamma: bool = False
    activation: Activation = "silu"
    scales_embedding: bool = False
    biased: tuple[str, ...] = ()
    bias_switches: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    head_dim_is_stated: bool = False
    window: SlidingWindow | None = None
    rope_theta: float = 10000.0
    rope_scalings: tuple[str, ...] | None = None
    rotary_fraction: float | None = None
    is_rotary_interleaved: bool = False
    attention: Mapping[str, float | None] = field(default_factory=dict)
    hf_layer: str = HF_LAYER
    hf_base: str = ""
    hf_further_layers: str | None = None
    hf_buffers: tuple[str, ...] = (".rotary_emb.inv_freq",)
    hf_keys: Mapping[str, str | None] = field(default_factory=dict)
    hf_defaults: Mapping[str, Any] = field(default_factory=dict)
    inner_factor: int = 0
    may_omit_groups: bool = False
    hf_activations: tuple[str, ...] = ("silu",)
    hf_harmless: tuple[str, ...] = ()
    mixture: Mixture | None = None
    hf_extra: Mapping[str, Any] = field(default_factory=dict)
    hf_fixed: Mapping[str, Any] = field(default_factory=dict)
    trtllm_activation: str = "silu"
    trtllm_biases: Mapping[str, str] = field(
        default_factory=lambda: {"attn_bias": QKV.name, "mlp_bias": FC1.name}
    )
    trtllm_attention: tuple[str, ...] = ()
    trtllm_fraction: str | None = None
    trtllm_states_head: bool = True
    trtllm_expert_size: str = "intermediate_size"
    trtllm_extra: Mapping[str, Any] = field(default_factory=dict)

    def inner_default(self, hidden: int) -> int | None:
        """Width of the MLP where it is null; None: it must be stated."""
        return self.inner_factor * hidden if self.inner_factor else None

    @property
    def is_gated(self) -> bool:
        """Whether the MLP multiplies its activated branch by another one; experts do."""
        return self.mixture is not None or len(by_name(self.linears)[FC1.name].parts) == 2

    @property
    def selectors(self) -> tuple[Selector, ...]:
        """What chooses and weighs experts, in a layer that has them."""
        return () if self.mixture is None else self.mixture.experts.selectors

    @property
    def norm_kinds(self) -> tuple[str, ...]:
        """Parameters of every norm."""
        return ("weight", "bias") if self.normalization == "LayerNorm" else ("weight",)

    @property
    def tables(self) -> tuple[Table, ...]:
        """In the order of the forward pass, with a head of its own."""
        positions = () if self.positions is None else (self.positions,)
        return (self.embedding, *positions, self.output_layer)

    def biases_of(self, hf: Mapping[str, Any]) -> tuple[str, ...]:
        """Linears with a bias, as a Hugging Face `config.json` says."""
        switched = [
            linear
            for key, linears in self.bias_switches.items()
            if hf.get(key, False)
            for linear in linears
        ]
        return (*self.biased, *switched)

    def may_have(self, biases: tuple[str, ...]) -> bool:
        """Whether the family can have biases on these linears, and only on them."""
        return set(self.biases_of(self._switches(biases))) == set(biases)

    def _switches(self, biases: tuple[str, ...]) -> dict[str, bool]:
        return {
            key: all(linear in biases for linear in linears)
            for key, linears in self.bias_switches.items()
        }

    def switches_of(self, biases: tuple[str, ...]) -> dict[str, bool]:
        """The inverse: value of each switch.

        Raises:
            ValueError: The family cannot have biases there, and only there.
        """
        if not self.may_have(biases):
            possible = [self.biased, *self.bias_switches.values()]
            raise UserError(
                f"biases on {list(biases)}: a {self.name} model has them on "
                f"{' and '.join(str(list(p)) for p in possible if p) or 'no linear'}, nowhere else."
            )
        return self._switches(biases)

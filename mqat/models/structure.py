"""The one table of what a decoder is made of, and what each piece is called elsewhere.

Nothing else in the product spells these names or knows in which order rows are fused; `verify/facts/`
is a second opinion on purpose. A family (`families/`) is a choice of rows of this table.

| name of                      | example                                                               |
|------------------------------|-----------------------------------------------------------------------|
| a module in a layer          | `mlp.linear_fc1`                                                      |
| the same, global             | `decoder.layers.3.mlp.linear_fc1`                                     |
| its parameter in checkpoints | `decoder.layers.mlp.linear_fc1.weight`, [layers, out, in]             |
| an expert's linear in a layer| `mlp.experts.5.linear_fc1`, whichever rank holds it                   |
| its parameter in checkpoints | `decoder.layers.mlp.experts.experts.linear_fc1.weight`,               |
|                              | [layers, experts, out, in]                                            |
| its frozen quantizer state   | `quantizers.decoder.layers.3.mlp.linear_fc1.weight_scale`             |
| its adapter in checkpoints   | `decoder.layers.3.mlp.linear_fc1.adapter.linear_in.weight`            |

Sources: Megatron-Core `models/gpt/gpt_model.py` and `transformer/attention.py`, transformers
`models/llama/modeling_llama.py`, llama.cpp `gguf-py/gguf/constants.py`, TensorRT-LLM
`docs/source/legacy/architecture/checkpoint.md`.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, Protocol

# Named sizes of a model; `DecoderConfig.size` gives the number.
Axis = Literal[
    "hidden", "intermediate", "query", "key_value", "head", "vocab", "positions",
    "expert_intermediate", "shared_intermediate", "experts", "one",
]  # fmt: skip

HF_LAYER, GGUF_LAYER, TRTLLM_LAYER = "model.layers.{i}.", "blk.{i}.", "transformer.layers.{i}."
_LAYERS = "decoder.layers."


class Sizes(Protocol):
    """What the table needs to know of a model."""

    @property
    def num_query_groups(self) -> int:
        """Key/value heads."""

    @property
    def num_experts(self) -> int:
        """Experts of a layer; 0: none."""

    def size(self, axis: Axis) -> int:
        """Global size, before any parallel split."""


@dataclass(frozen=True)
class Part:
    """One weight of a fused linear, as others store it apart.

    Parts that share a module of Hugging Face or of TensorRT-LLM lie in it in the order of the table.

    Attributes:
        rows: Its output features.
        hf: Hugging Face module, after the family's prefix of a layer.
        gguf: llama.cpp tensor without its suffix, after `GGUF_LAYER`.
        trtllm: TensorRT-LLM module, after `TRTLLM_LAYER`.
    """

    rows: Axis
    hf: str
    gguf: str
    trtllm: str


@dataclass(frozen=True)
class Linear:
    """A linear of every layer.

    Attributes:
        name: In a Megatron layer.
        parallel: `column`: output features are cut over TP; `row`: input features.
        columns: Input features.
        parts: Fused along the output features.
        norm: Norm of the layer whose output it reads; None: it reads another linear's channels,
        fed_by: (name, part number) of that linear.
        activation: Module of the layer in between, whose output it reads; None: none.
        is_by_query_group: Rows go query group by query group, each group's rows part by part (Megatron's
            qkv: its query heads, key head, value head); otherwise part by part.
        expert: Number among the experts of a layer, whose copies checkpoints stack before the output
            features; None: not of an expert.
        trtllm_order: Of its parts in TensorRT-LLM's modules, where that is not the table's.
        is_transposed_in_hf: Hugging Face stores its weight as (in, out), as GPT-2's `Conv1D` does.
    """

    name: str
    parallel: Literal["column", "row"]
    columns: Axis
    parts: tuple[Part, ...]
    norm: str | None = None
    fed_by: tuple[str, int] | None = None
    activation: str | None = None
    is_by_query_group: bool = False
    expert: int | None = None
    trtllm_order: tuple[int, ...] | None = None
    is_transposed_in_hf: bool = False

    @property
    def key(self) -> str:
        """Of the weight in checkpoints."""
        return stacked_key(self._stacked_name, "weight")

    @property
    def bias_key(self) -> str:
        """Of the bias in checkpoints, where there is one."""
        return stacked_key(self._stacked_name, "bias")

    @property
    def _stacked_name(self) -> str:
        return self.name if self.expert is None else f"{_STACKED_EXPERTS}.{self.kind}"

    @property
    def kind(self) -> str:
        """Its name in the attention, the MLP, or the expert: the same for all experts."""
        return self.name.rpartition(".")[2]

    @property
    def stored_at(self) -> tuple[slice, ...]:
        """Leading indices in a layer's part of the tensors of `key` and `bias_key`."""
        return () if self.expert is None else (slice(self.expert, self.expert + 1),)

    @property
    def separate_parts(self) -> int:
        """Parts whose local rows lie one after the other, so that checkpoints keep them apart."""
        return 1 if self.is_by_query_group else len(self.parts)

    def shape(self, sizes: Sizes) -> tuple[int, int]:
        """Global (out_features, in_features)."""
        return self.rows_of(sizes, range(len(self.parts))), sizes.size(self.columns)

    def rows_of(self, sizes: Sizes, parts: Iterable[int]) -> int:
        """Output features of some parts together."""
        return sum(sizes.size(self.parts[number].rows) for number in parts)

    def stored_shape(self, sizes: Sizes) -> tuple[int, ...]:
        """Of a layer's weight in checkpoints: [(experts,) out, in]."""
        experts = () if self.expert is None else (sizes.num_experts,)
        return (*experts, *self.shape(sizes))

    def units(self, sizes: Sizes) -> int:
        """Runs of rows that hold some of every part: query groups, or one."""
        return sizes.num_query_groups if self.is_by_query_group else 1

    def fused_rows(self, sizes: Sizes, part: int, wanted: slice) -> list[slice]:
        """Global rows of the fused weight that hold rows `wanted` of one part, in order."""
        units = self.units(sizes)
        lengths = [sizes.size(p.rows) // units for p in self.parts]
        found, start = [], wanted.start
        while start < wanted.stop:
            unit, inside = divmod(start, lengths[part])
            count = min(wanted.stop - start, lengths[part] - inside)
            first = unit * sum(lengths) + sum(lengths[:part]) + inside
            found.append(slice(first, first + count))
            start += count
        return found

    def hf_modules(self) -> dict[str, list[int]]:
        """Hugging Face module -> numbers of the parts in it, in row order."""
        return _grouped((number, part.hf) for number, part in enumerate(self.parts))

    def trtllm_modules(self) -> dict[str, list[int]]:
        """TensorRT-LLM module -> numbers of the parts in it, in row order."""
        order = self.trtllm_order or range(len(self.parts))
        return _grouped((number, self.parts[number].trtllm) for number in order)


def _grouped(parts: Iterable[tuple[int, str]]) -> dict[str, list[int]]:
    """Module -> numbers of the parts that name it."""
    found: dict[str, list[int]] = {}
    for number, module in parts:
        found.setdefault(module, []).append(number)
    return found


@dataclass(frozen=True)
class Norm:
    """A norm of every layer, or the last one of the model.

    Attributes:
        name: In a Megatron layer (of the last one, in the model).
        size: Of its weight, and of its bias where the family has one.
        key: Of the weight in checkpoints, where Transformer Engine's names are kept.
        hf: Hugging Face module, after the family's prefix of a layer.
        gguf: llama.cpp tensor without its suffix, after `GGUF_LAYER`.
        trtllm: TensorRT-LLM module, after `TRTLLM_LAYER`.
    """

    name: str
    size: Axis
    key: str
    hf: str
    gguf: str
    trtllm: str

    @property
    def bias_key(self) -> str:
        """Of the bias in checkpoints, where there is one."""
        return self.key.removesuffix("weight") + "bias"

    @property
    def stem(self) -> str:
        """What keys of a layer's norm begin with, inside the layer."""
        return self.key.removeprefix(_LAYERS).removesuffix("weight")


@dataclass(frozen=True)
class Table:
    """A table [rows, hidden] of vectors that tokens, or their positions, look up.

    Those of a vocabulary are padded and cut over TP by rows; every rank holds all positions.

    Attributes:
        name: In the Megatron model.
        hf: Hugging Face module.
        gguf: llama.cpp tensor without its suffix.
        trtllm: TensorRT-LLM module.
        rows: Axis of the rows.
    """

    name: str
    hf: str
    gguf: str
    trtllm: str
    rows: Axis = "vocab"

    @property
    def key(self) -> str:
        """Of the weight in checkpoints."""
        return f"{self.name}.weight"


@dataclass(frozen=True)
class Cache:
    """Keys and values that attention keeps, in every layer.

    Attributes:
        name: Megatron module that reads them.
        hf: Hugging Face attention module, after `HF_LAYER`.
        hf_parts: Hugging Face linears that make keys and values.
        trtllm: TensorRT-LLM attention module, after `TRTLLM_LAYER`.
    """

    name: str
    hf: str
    hf_parts: tuple[str, str]
    trtllm: str


INPUT_NORM = Norm(
    "input_layernorm",
    "hidden",
    key="decoder.layers.self_attention.linear_qkv.layer_norm_weight",
    hf="input_layernorm",
    gguf="attn_norm",
    trtllm="input_layernorm",
)
MLP_NORM = Norm(
    "pre_mlp_layernorm",
    "hidden",
    key="decoder.layers.mlp.linear_fc1.layer_norm_weight",
    hf="post_attention_layernorm",
    gguf="ffn_norm",
    trtllm="post_layernorm",
)
# Of what attention and MLP add to the hidden states (Gemma 2 and 3); `specs/elementwise.py` (OutputNorm)
# puts them where Megatron adds. Checkpoints hold them as NeMo does.
ATTENTION_OUTPUT_NORM = Norm(
    "self_attn_bda.norm",
    "hidden",
    key="decoder.layers.self_attention.linear_proj.post_layernorm.weight",
    hf="post_attention_layernorm",
    gguf="post_attention_norm",
    trtllm="post_layernorm",
)
MLP_OUTPUT_NORM = Norm(
    "mlp_bda.norm",
    "hidden",
    key="decoder.layers.mlp.linear_fc2.post_layernorm.weight",
    hf="post_feedforward_layernorm",
    gguf="post_ffw_norm",
    trtllm="post_feedforward_layernorm",
)
OUTPUT_NORMS = (ATTENTION_OUTPUT_NORM, MLP_OUTPUT_NORM)
QUERY_NORM = Norm(
    "self_attention.q_layernorm",
    "head",
    key="decoder.layers.self_attention.q_layernorm.weight",
    hf="self_attn.q_norm",
    gguf="attn_q_norm",
    trtllm="attention.q_layernorm",
)
KEY_NORM = Norm(
    "self_attention.k_layernorm",
    "head",
    key="decoder.layers.self_attention.k_layernorm.weight",
    hf="self_attn.k_norm",
    gguf="attn_k_norm",
    trtllm="attention.k_layernorm",
)
FINAL_NORM = Norm(
    "decoder.final_layernorm",
    "hidden",
    key="decoder.final_layernorm.weight",
    hf="model.norm",
    gguf="output_norm",
    trtllm="transformer.ln_f",
)

QKV = Linear(
    "self_attention.linear_qkv",
    "column",
    "hidden",
    (
        Part("query", "self_attn.q_proj", "attn_q", "attention.qkv"),
        Part("key_value", "self_attn.k_proj", "attn_k", "attention.qkv"),
        Part("key_value", "self_attn.v_proj", "attn_v", "attention.qkv"),
    ),
    norm=INPUT_NORM.name,
    is_by_query_group=True,
)
PROJ = Linear(
    "self_attention.linear_proj",
    "row",
    "query",
    (Part("hidden", "self_attn.o_proj", "attn_output", "attention.dense"),),
    fed_by=(QKV.name, 2),
)
ACTIVATION = "mlp.activation_func"
# TensorRT-LLM's `fc` is the activated (gate) branch and its `gate` the linear (up) branch.
FC1 = Linear(
    "mlp.linear_fc1",
    "column",
    "hidden",
    (
        Part("intermediate", "mlp.gate_proj", "ffn_gate", "mlp.fc"),
        Part("intermediate", "mlp.up_proj", "ffn_up", "mlp.gate"),
    ),
    norm=MLP_NORM.name,
)
FC2 = Linear(
    "mlp.linear_fc2",
    "row",
    "intermediate",
    (Part("hidden", "mlp.down_proj", "ffn_down", "mlp.proj"),),
    fed_by=(FC1.name, 1),
    activation=ACTIVATION,
)

# An MLP without a gate. Nothing feeds its second linear whose channels could be scaled instead.
PLAIN_FC1 = Linear(
    FC1.name,
    "column",
    "hidden",
    (Part("intermediate", "mlp.up_proj", "ffn_up", "mlp.fc"),),
    norm=MLP_NORM.name,
)
PLAIN_FC2 = Linear(FC2.name, "row", "intermediate", FC2.parts)
# In Megatron-Core's `SequentialMLP`, whose checkpoints have one name for all experts; `experts.py` has
# their rows.
EXPERTS = "mlp.experts"
_STACKED_EXPERTS = f"{EXPERTS}.experts"

EMBEDDING = Table(
    "embedding.word_embeddings", "model.embed_tokens", "token_embd", "transformer.vocab_embedding"
)
OUTPUT_LAYER = Table("output_layer", "lm_head", "output", "lm_head")
TABLES = (EMBEDDING, OUTPUT_LAYER)  # of the vocabulary
POSITIONS = Table(
    "embedding.position_embeddings",
    "transformer.wpe",
    "position_embd",
    "transformer.position_embedding",
    rows="positions",
)

CORE_ATTENTION = Cache(
    "self_attention.core_attention",
    hf="self_attn",
    hf_parts=(QKV.parts[1].hf, QKV.parts[2].hf),
    trtllm="attention",
)

# Of a dense decoder with a gated MLP, in the order of the forward pass.
DENSE_LINEARS = (QKV, PROJ, FC1, FC2)
PLAIN_LINEARS = (QKV, PROJ, PLAIN_FC1, PLAIN_FC2)
DENSE_NORMS = (INPUT_NORM, MLP_NORM)


def in_layer(layer: int, name: str) -> str:
    """Global name of a module of one layer."""
    return f"{_LAYERS}{layer}.{name}"


def is_in_layer(name: str) -> bool:
    """Whether a global name is that of a layer's module (else a vocabulary table's, the last norm's)."""
    return name.startswith(_LAYERS)


def is_expert(name: str) -> bool:
    """Whether a global name is that of an expert's linear."""
    return is_in_layer(name) and split_name(name)[1].startswith(f"{EXPERTS}.")


def split_name(name: str) -> tuple[int, str]:
    """Layer number and name in the layer, of a global name."""
    number, _, rest = name.removeprefix(_LAYERS).partition(".")
    return int(number), rest


def stacked_key(name: str, kind: str) -> str:
    """Checkpoint key of a parameter of every layer: Megatron stacks the layers in one tensor."""
    return f"{_LAYERS}{name}.{kind}"


def layer_key(layer: int, key: str) -> str:
    """Where layers differ, Megatron does not stack them: a layer's key of what is `key` elsewhere."""
    return f"{_LAYERS}{layer}.{key.removeprefix(_LAYERS)}"


def quantizer_key(module: str, operand: str, tensor: str) -> str:
    """Checkpoint key of frozen quantizer state.

    Args:
        module: Global name.
        operand: `weight`, `input`, `output`, or of a cache `kv`, `key`, `value`.
        tensor: `scale`, `zero_point` or `global_scale`.
    """
    return f"quantizers.{module}.{operand}_{tensor}"


def adapter_key(module: str, side: Literal["in", "out"]) -> str:
    """Checkpoint key of an adapter's A (`in`) or B (`out`), by NeMo's names; layers are apart.

    `module`: Global name of the linear.
    """
    return f"{module}.adapter.linear_{side}.weight"


def packed_key(module: str, tensor: str) -> str:
    """Checkpoint key of a tensor of a packed weight.

    Args:
        module: Global name of the linear.
        tensor: As in `kernels.frozen_codes`.
    """
    return f"packed.{module}.{tensor}"


def is_adapter_key(key: str) -> bool:
    """Whether a parameter of a model, or a key, is an adapter's."""
    return ".adapter.linear_" in key


def is_table_key(key: str) -> bool:
    """Whether a checkpoint key is that of a vocabulary table or of its quantizer state."""
    return key.removeprefix("quantizers.").startswith(tuple(table.name for table in TABLES))


def by_name(linears: Iterable[Linear]) -> dict[str, Linear]:
    """Linears by their name in a layer."""
    return {linear.name: linear for linear in linears}

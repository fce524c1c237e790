"""Metadata of a GGUF file read as a decoder; what it says and mqat does not honour is refused.

Sources: llama.cpp `src/llama-arch.cpp` (all keys), `src/llama-model.cpp` (which of them `llama`, `qwen2`
and `qwen3` read, with which defaults), `gguf-py/gguf/constants.py`.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mqat.checkpoints.hf_config import token_ids
from mqat.checkpoints.values import MOST_LISTED, is_positive, is_whole, whole_rule
from mqat.errors import UserError
from mqat.models.decoder import FAMILIES, DecoderConfig
from mqat.models.family import Family
from mqat.models.structure import EMBEDDING, GGUF_LAYER, OUTPUT_LAYER

# First words of keys that describe the file, its making or its tokenizer, which `data/` reads.
_OUTSIDE = ("general", "tokenizer", "split", "quantize", "mradermacher", "GGUF")
# Inside the architecture: read below.
_UNDERSTOOD = {
    "context_length", "embedding_length", "feed_forward_length", "block_count", "attention.head_count",
    "attention.head_count_kv", "attention.key_length", "attention.value_length", "rope.dimension_count",
    "attention.sliding_window", "rope.freq_base", "rope.scaling.type", "vocab_size",
    "rope.scaling.factor", "rope.freq_base_swa",
    "attention.sliding_window_pattern",
}  # fmt: skip
# The same, by what the norms compute.
_EPSILON = {
    "RMSNorm": "attention.layer_norm_rms_epsilon", "LayerNorm": "attention.layer_norm_epsilon",
}  # fmt: skip
# Inside the architecture: changes what is computed with any other value.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,), "expert_count": (0,), "expert_used_count": (0,),
    "rope.scale_linear": (1, 0), "rope.scaling.attn_factor": (1,),
    "tensor_data_layout": ("Meta AI original pth",),
}  # fmt: skip
# The same in mixtures, whose experts are chosen by a softmax (1), with weights that add up to one.
_OF_EXPERTS = {"expert_count", "expert_used_count", "expert_feed_forward_length"}
_NEUTRAL_OF_EXPERTS: dict[str, tuple[Any, ...]] = {
    "expert_gating_func": (1,), "expert_weights_norm": (True,), "expert_weights_scale": (0, 1),
    "expert_shared_count": (0,), "leading_dense_block_count": (0,), "expert_group_count": (0, 1),
}  # fmt: skip
# Layers of Gemma 3 27B, whose scores llama.cpp scales by (width / heads)^(-1/2), not by that of a head.
_SCALED_BY_WIDTH = 62
# YaRN's only, which `rope.scaling.type` rules out.
_HARMLESS = {"rope.scaling.original_context_length", "rope.scaling.finetuned"}
_TOKENS = {
    "bos_token_id": ("bos_token_id",), "pad_token_id": ("padding_token_id",),
    "eos_token_id": ("eos_token_id", "eot_token_id", "eom_token_id"),  # llama.cpp stops at all of them
}  # fmt: skip


class Metadata:
    """Keys and values of one file, with errors that name them."""

    def __init__(self, path: Path, fields: Mapping[str, Any]) -> None:
        self.path = path
        self._fields = fields
        for key, field in fields.items():
            if key != field.name:  # the gguf package renames what it has seen before
                raise UserError(f"{path}: GGUF key {field.name!r} stands there twice.")

    def __contains__(self, key: str) -> bool:
        return key in self._fields

    def keys(self) -> list[str]:
        """All keys."""
        return list(self._fields)

    def value(self, key: str) -> Any:
        """Of a key, or None.

        Raises:
            UserError: The bytes are no value of the type that they say.
        """
        if key not in self._fields:
            return None
        try:
            return self._fields[key].contents()
        except (ValueError, IndexError, TypeError) as error:
            raise UserError(f"{self.path}: GGUF key {key!r} is unreadable ({error}).") from error

    def count(self, key: str) -> int | None:
        """Elements of an array, without reading them, which takes seconds for vocabularies."""
        return len(self._fields[key].data) if key in self._fields else None

    def whole(
        self, key: str, default: int | None = None, *, least: int = 1, most: float = math.inf
    ) -> int:
        """An integer; `default`, if there is one, where the key is missing."""
        value = self.value(key) if key in self._fields else default
        if not is_whole(value, least, most):
            raise self._wrong(key, value, f"{whole_rule(least, most)}, the same in all layers")
        return value

    def positive(self, key: str, default: float | None = None) -> float:
        """A finite number above zero."""
        value = self.value(key) if key in self._fields else default
        if not is_positive(value):
            raise self._wrong(key, value, "a positive number")
        return float(value)

    def _wrong(self, key: str, value: Any, rule: str) -> UserError:
        found = repr(value)[:60] if key in self._fields else "missing"
        return UserError(f"{self.path}: GGUF key {key!r} is {found}, must be {rule}.")


def architecture(metadata: Metadata) -> Family:
    """The family of a file that holds a whole model.

    Raises:
        UserError: It is an adapter or another part of a model, or of no family that is known.
    """
    kind = metadata.value("general.type")
    if kind not in (None, "model"):
        raise UserError(
            f"{metadata.path}: general.type={kind!r}: this is not a whole model; merge an adapter into "
            "its base model first (llama.cpp: llama-export-lora)."
        )
    name = metadata.value("general.architecture")
    families = [f for f in FAMILIES.values() if f.gguf_architecture == name and name is not None]
    if not families:
        known = sorted({f.gguf_architecture for f in FAMILIES.values() if f.gguf_architecture})
        raise UserError(f"{metadata.path}: architecture {name!r}; known are {known}.")
    # Mistral's files say `llama`: the first family of an architecture stands for all. So do Mixtral's,
    # which have experts.
    has_experts = bool(metadata.value(f"{name}.expert_count"))
    alike = (f for f in families if (f.mixture is not None) == has_experts)
    return next(alike, families[0])


def decoder_config(metadata: Metadata, shapes: Mapping[str, tuple[int, ...]]) -> DecoderConfig:
    """The model that metadata describe.

    Args:
        metadata: Of the (first) file.
        shapes: Of all tensors; they alone say whether there are a head and biases, and, where
            metadata do not, the size of the vocabulary.

    Raises:
        UserError: A key is missing, wrong, contradicts another, or is not honoured.
    """
    family = architecture(metadata)
    prefix = f"{family.gguf_architecture}."
    understood = _UNDERSTOOD | {_EPSILON[family.normalization]}
    is_mixture = family.mixture is not None
    _check_keys(metadata, prefix, understood | (_OF_EXPERTS if is_mixture else set()))
    context = metadata.whole(f"{prefix}context_length")
    heads = metadata.whole(f"{prefix}attention.head_count")
    hidden = metadata.whole(f"{prefix}embedding_length")
    head_dim = metadata.whole(f"{prefix}attention.key_length", hidden // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if metadata.whole(prefix + key, head_dim) != head_dim:
            raise UserError(
                f"{metadata.path}: {prefix}{key}={metadata.value(prefix + key)}, but heads have "
                f"{head_dim} channels (attention.key_length, or embedding_length / head_count): heads "
                "of two sizes, or rotated in part, are not built."
            )
    first = GGUF_LAYER.format(i=0)
    vocab = _vocabulary(metadata, prefix, shapes)
    return DecoderConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=metadata.whole(f"{prefix}feed_forward_length"),
        num_layers=metadata.whole(f"{prefix}block_count", most=MOST_LISTED),
        num_attention_heads=heads,
        num_query_groups=metadata.whole(f"{prefix}attention.head_count_kv", heads),
        head_dim=head_dim,
        rms_norm_eps=metadata.positive(f"{prefix}{_EPSILON[family.normalization]}"),
        rope_theta=metadata.positive(f"{prefix}rope.freq_base", 10000.0),
        rope_scaling=_scaling(metadata, prefix),
        **_windows(metadata, prefix, family),
        max_position_embeddings=context,
        tie_word_embeddings=f"{OUTPUT_LAYER.gguf}.weight" not in shapes,
        family=family.name,
        **_experts(metadata, prefix, family),
        biases=tuple(
            linear.name
            for linear in family.linears
            if any(f"{first}{part.gguf}.bias" in shapes for part in linear.parts)
        ),
        token_ids=_token_ids(metadata, vocab),
    )


def _experts(metadata: Metadata, prefix: str, family: Family) -> dict[str, Any]:
    """Of mixtures."""
    if family.mixture is None:
        return {}
    return {
        "num_experts": metadata.whole(f"{prefix}expert_count"),
        "experts_per_token": metadata.whole(f"{prefix}expert_used_count"),
        "expert_intermediate_size": metadata.whole(prefix + family.mixture.gguf_size),
        "normalizes_expert_weights": True,
    }


def _scaling(metadata: Metadata, prefix: str) -> dict[str, Any] | None:
    """llama.cpp scales linearly by default; factors of 0 and 1 mean not at all."""
    key, kind = f"{prefix}rope.scaling.factor", metadata.value(f"{prefix}rope.scaling.type")
    if kind == "none" or metadata.value(key) in (None, 0, 1):
        return None
    return {"rope_type": "linear", "factor": metadata.positive(key)}


def _windows(metadata: Metadata, prefix: str, family: Family) -> dict[str, Any]:
    """Of architectures whose windows llama.cpp computes, with the numbers that it has built in."""
    key, context = f"{prefix}attention.sliding_window", metadata.whole(f"{prefix}context_length")
    layers = metadata.whole(f"{prefix}block_count", most=MOST_LISTED)
    if family.window is None or family.window.every is None:
        # Few converters write the key: a file without it is taken to have no window.
        if (window := metadata.whole(key, context)) < context:
            raise UserError(
                f"{metadata.path}: sliding_window={window} of a {family.name} model, of whose sequences "
                f"of up to {context} tokens llama.cpp attends to all; use the Hugging Face directory."
            )
        return {}
    every = metadata.whole(f"{key}_pattern", family.window.every[1])
    windowed = [layer for layer in range(layers) if (layer + 1) % every]
    if not windowed:
        return {}
    base = metadata.positive(
        f"{prefix}rope.freq_base_swa", family.attention["rope_local_base_freq"]
    )
    found = {"sliding_window": metadata.whole(key), "windowed_layers": windowed}
    if layers == _SCALED_BY_WIDTH:
        heads = metadata.whole(f"{prefix}attention.head_count")
        found["attention_scale"] = (metadata.whole(f"{prefix}embedding_length") // heads) ** -0.5
    return found | {"windowed_rope_theta": base}


def _check_keys(metadata: Metadata, prefix: str, understood: set[str]) -> None:
    """Refuses what llama.cpp may read and no line of this module knows."""
    for key in metadata.keys():
        if key.startswith(prefix):
            inside = key.removeprefix(prefix)
            neutral = _NEUTRAL.get(inside, ()) + _NEUTRAL_OF_EXPERTS.get(inside, ())
            if inside in understood | _HARMLESS or metadata.value(key) in neutral:
                continue
        elif key.split(".")[0] in _OUTSIDE and not key.startswith("general.tensor_extra."):
            continue
        value = repr(metadata.value(key))[:60]
        raise UserError(
            f"{metadata.path}: GGUF key {key!r} is {value}, which is not honoured; use the Hugging Face "
            "directory of this model, if it is one that mqat reads."
        )
    kind = metadata.value(f"{prefix}rope.scaling.type")
    if kind not in (None, "none", "linear"):  # linear, llama.cpp's default, by a factor of 1
        raise UserError(
            f"{metadata.path}: scaled rotary positions (rope scaling {kind!r}) are not read from GGUF; "
            "use the Hugging Face directory of this model."
        )


def _vocabulary(metadata: Metadata, prefix: str, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Rows of the table: as many as tokens, which llama.cpp asks for."""
    table, size_key = f"{EMBEDDING.gguf}.weight", f"{prefix}vocab_size"
    counts = {
        size_key: metadata.whole(size_key) if size_key in metadata else None,
        "tokenizer.ggml.tokens": metadata.count("tokenizer.ggml.tokens"),
        f"rows of {table}": shapes[table][0] if shapes.get(table) else None,
    }
    said = {name: count for name, count in counts.items() if count is not None}
    if len(set(said.values())) != 1:
        told = ", ".join(f"{count} {name}" for name, count in said.items()) or "nothing"
        raise UserError(f"{metadata.path}: the vocabulary's size is contradictory: {told}.")
    return next(iter(said.values()))


def _token_ids(metadata: Metadata, vocab_size: int) -> dict[str, int | list[int]]:
    found: dict[str, Any] = {}
    for name, keys in _TOKENS.items():
        given: list[Any] = []
        for value in (metadata.value(f"tokenizer.ggml.{key}") for key in keys):
            if value not in (None, -1, *given):
                given.append(value)
        if given:
            found[name] = given if len(given) > 1 else given[0]
    try:
        return token_ids(found, vocab_size)
    except UserError as error:
        raise UserError(f"{metadata.path}: tokenizer.ggml: {error}") from error

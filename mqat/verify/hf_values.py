"""A Hugging Face directory's tensors: which must exist, and what their values must satisfy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from mqat.verify.hf_layout import FUSED, MODULES, HfConfig, Storage

EMBEDDING, FINAL_NORM, LM_HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
NORMS = ("input_layernorm", "post_attention_layernorm")
Expected = dict[str, tuple[str, tuple[int, ...]]]  # name -> dtype, shape

# A calibrated weight reaches its largest code; see `values.py`.
_LEAST_REACH = {(8, False): 64.0, (8, True): 64.0, (4, False): 4.0}


def expected_tensors(config: HfConfig) -> Expected:
    """Name -> (safetensors dtype, shape) of the whole directory."""
    raw, dtype = config.raw, config.dtype
    hidden, vocab = config.size("hidden"), int(raw["vocab_size"])
    result: Expected = {EMBEDDING: (dtype, (vocab, hidden)), FINAL_NORM: (dtype, (hidden,))}
    if not raw["tie_word_embeddings"]:
        result[LM_HEAD] = (dtype, (vocab, hidden))
    for layer in range(raw["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        result |= {f"{prefix}{norm}.weight": (dtype, (hidden,)) for norm in NORMS}
        one: tuple[int, ...] = () if config.cache_scales and config.has_scalar_scales else (1,)
        result |= {prefix + name: ("F32", one) for name in config.cache_scales.values()}
        for module, (rows, cols) in MODULES.items():
            name = prefix + module
            shape = (config.size(rows), config.size(cols))
            storage = config.storage.get(name)
            if storage is None:
                result[f"{name}.weight"] = (dtype, shape)
                continue
            tensors = _stored(storage, shape, dtype)
            result |= {f"{name}.{suffix}": entry for suffix, entry in tensors.items()}
    return result


def _stored(storage: Storage, shape: tuple[int, int], dtype: str) -> Expected:
    out, width = shape
    tensors: Expected = {"weight": ("F8_E4M3" if storage.is_float else "I8", shape)}
    if storage.is_packed:
        words = -(-width * storage.bits // 32)
        tensors = {"weight_packed": ("I32", (out, words)), "weight_shape": ("I64", (2,))}
    one: tuple[int, ...] = () if storage.is_scalar else (1,)
    if storage.group_size > 0:
        tensors["weight_scale"] = (dtype, (out, -(-width // storage.group_size)))
    else:
        tensors["weight_scale"] = ("F32", (out, 1) if storage.group_size == 0 else one)
    if storage.has_input_scale:
        tensors["input_scale"] = ("F32", one)
    return tensors


def codes_of(tensors: Mapping[str, Tensor], storage: Storage) -> Tensor:
    """Codes [O, I] of a module (int8 or float8), from its tensors by suffix."""
    if not storage.is_packed:
        return tensors["weight"]
    words, width = tensors["weight_packed"], int(tensors["weight_shape"][1])
    per_word, half = 32 // storage.bits, 1 << (storage.bits - 1)
    # Bit arithmetic of its own, on purpose: one field of the word after the other.
    wide = words.to(torch.int64) & 0xFFFFFFFF
    fields = [(wide >> (storage.bits * i)) % (2 * half) - half for i in range(per_word)]
    return torch.stack(fields, dim=2).flatten(1)[:, :width].to(torch.int8)


def module_problems(
    name: str, tensors: Mapping[str, Tensor], storage: Storage, shape: tuple[int, int]
) -> Iterator[str]:
    """What is wrong with the values of a quantized module."""
    sound = True
    for suffix, tensor in tensors.items():
        if not tensor.float().isfinite().all():
            sound = False
            yield f"{name}.{suffix} holds NaN or infinity"
        elif suffix.endswith("_scale") and not (tensor.float() > 0).all():
            yield f"{name}.{suffix} holds a scale that is not positive"
    if storage.is_packed and tensors["weight_shape"].tolist() != list(shape):
        yield f"{name}.weight_shape is {tensors['weight_shape'].tolist()}, expected {list(shape)}"
        return
    if not sound:
        return
    codes = codes_of(tensors, storage)
    kind = "weight_packed" if storage.is_packed else "weight"
    symmetric = storage.bits == 8 and not storage.is_float and not storage.is_packed
    if symmetric and (codes == -128).any():
        yield f"{name}.{kind} holds the code -128, outside -127..127"
    if storage.bits == 4 and codes.dtype == torch.int8 and not (codes.abs() <= 8).all():
        yield f"{name}.{kind} holds a code outside -8..7"
    reach = float(codes.float().abs().max())
    if 0 < reach < _LEAST_REACH[storage.bits, storage.is_float]:
        yield f"{name}.{kind} uses codes up to {reach:g} only; its scale is too large"


def fused_problems(prefix: str, scales: Mapping[str, Tensor], config: HfConfig) -> Iterator[str]:
    """Scales that differ between projections which servers fuse, in one layer.

    Args:
        prefix: `model.layers.3.`
        scales: Full name -> scale, of this layer.
        config: Of the directory.
    """
    for modules in FUSED:
        first = prefix + modules[0]
        storage = config.storage.get(first)
        if storage is None:
            continue
        suffixes = ["input_scale"] if storage.has_input_scale else []
        if storage.group_size == -1:
            suffixes.append("weight_scale")
        for suffix in suffixes:
            for module in modules[1:]:
                a, b = f"{first}.{suffix}", f"{prefix}{module}.{suffix}"
                if a in scales and b in scales and not torch.equal(scales[a], scales[b]):
                    yield f"{b} differs from {a}; fused kernels need one value"

"""A Hugging Face directory's tensors: which must exist, and what their values must satisfy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from mqat.verify.hf_layout import FUSED, MODULES, HfConfig, Storage
from mqat.verify.operands import fp4_unpacked, fp4_values
from mqat.verify.values import int4_codes

EMBEDDING, FINAL_NORM, LM_HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
NORMS = ("input_layernorm", "post_attention_layernorm")
Expected = dict[str, tuple[str, tuple[int, ...]]]  # name -> dtype, shape

# A calibrated weight reaches its largest code; see `values.py`.
_LEAST_REACH = {(8, False): 64.0, (8, True): 64.0, (4, False): 4.0, (4, True): 3.0}


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
            if module in config.biased:
                result[f"{name}.bias"] = (dtype, shape[:1])
            if storage is None:
                result[f"{name}.weight"] = (dtype, shape)
                continue
            tensors = _stored(storage, shape, dtype)
            result |= {f"{name}.{suffix}": entry for suffix, entry in tensors.items()}
    return result


def _stored(storage: Storage, shape: tuple[int, int], dtype: str) -> Expected:
    out, width = shape
    one: tuple[int, ...] = () if storage.is_modelopt else (1,)
    codes = ("F8_E4M3" if storage.is_float else "I8", shape)
    if storage.packing == "words":
        codes = ("I32", (out, -(-width * storage.bits // 32)))
    elif storage.packing:
        codes = ("U8", (out // 2, width) if storage.packing == "rows" else (out, width // 2))
    tensors: Expected = {storage.weight_name: codes}
    if storage.packing == "words":
        tensors["weight_shape"] = ("I64", (2,))
    if storage.has_two_levels:
        upper = "weight_scale_2" if storage.is_modelopt else "weight_global_scale"
        tensors |= {"weight_scale": ("F8_E4M3", (out, width // 16)), upper: ("F32", one)}
    elif storage.group_size > 0:
        # ExecuTorch's INT4 has float32 steps; all others lie on the model dtype's grid.
        scales = "F32" if storage.input == "token uint8" else dtype
        tensors["weight_scale"] = (scales, (out, -(-width // storage.group_size)))
    elif storage.group_size == 0:
        tensors["weight_scale"] = ("F32", (out,) if storage.is_modelopt else (out, 1))
    else:
        tensors["weight_scale"] = ("F32", one)
    if storage.is_asymmetric:
        groups = -(-width // storage.group_size)
        tensors["weight_zero_point"] = ("I32", (-(-out * storage.bits // 32), groups))
    if storage.packing == "rows":
        tensors["pre_quant_scale"] = (dtype, (width,))
        if storage.input is not None:
            tensors["weight_scale_2"] = ("F32", one)
    if storage.input_scale_name is not None:
        tensors[storage.input_scale_name] = ("F32", one)
    return tensors


def _fields(words: Tensor, bits: int) -> Tensor:
    """Signed numbers in 32-bit words, int8 [..., words, fields]; one field after the other."""
    half = 1 << (bits - 1)
    wide = words.to(torch.int64) & 0xFFFFFFFF
    fields = [(wide >> (bits * i)) % (2 * half) - half for i in range(32 // bits)]
    return torch.stack(fields, dim=-1).to(torch.int8)


def codes_of(tensors: Mapping[str, Tensor], storage: Storage) -> Tensor:
    """Codes [O, I] of a module (int8, float8, or uint8 of FP4), from its tensors by suffix."""
    stored = tensors[storage.weight_name]
    if storage.packing == "words":
        width = int(tensors["weight_shape"][1])
        return _fields(stored, storage.bits).flatten(1)[:, :width]
    if storage.packing == "rows":
        return int4_codes(stored)
    return fp4_unpacked(stored) if storage.packing == "columns" else stored


def zero_points_of(tensors: Mapping[str, Tensor], storage: Storage) -> Tensor:
    """Zero points int8 [O, groups], packed along the rows."""
    rows = int(tensors["weight_shape"][0])
    return _fields(tensors["weight_zero_point"].t(), storage.bits).flatten(1)[:, :rows].t()


def steps_of(tensors: Mapping[str, Tensor], storage: Storage) -> Tensor:
    """Steps of the weight as they are used, float32, in the stored shape."""
    scale = tensors["weight_scale"].float()
    if not storage.has_two_levels:
        return scale
    if storage.is_modelopt:
        return scale * tensors["weight_scale_2"]
    return scale / tensors["weight_global_scale"]


def module_values(tensors: Mapping[str, Tensor], storage: Storage) -> Tensor:
    """The weight that a server multiplies by, float32 [O, I]."""
    codes, steps = codes_of(tensors, storage), steps_of(tensors, storage)
    values = fp4_values(codes) if storage.has_two_levels else codes.float()
    if storage.is_asymmetric:
        zeros = zero_points_of(tensors, storage).float()
        values = values - zeros.repeat_interleave(storage.group_size, dim=1)
    if storage.group_size > 0:
        steps = steps.repeat_interleave(storage.group_size, dim=1)
    if storage.group_size == 0:
        steps = steps.reshape(-1, 1)
    return values * steps


def module_problems(
    name: str, tensors: Mapping[str, Tensor], storage: Storage, shape: tuple[int, int]
) -> Iterator[str]:
    """What is wrong with the values of a quantized module."""
    sound = True
    for suffix, tensor in tensors.items():
        if not tensor.float().isfinite().all():
            sound = False
            yield f"{name}.{suffix} holds NaN or infinity"
        elif "_scale" in suffix and not (tensor.float() > 0).all():
            yield f"{name}.{suffix} holds a scale that is not positive"
        elif suffix == "pre_quant_scale" and not (tensor.float() == 1).all():
            yield f"{name}.{suffix} is not all ones, but mqat folds smoothing into the weights"
    if storage.packing == "words" and tensors["weight_shape"].tolist() != list(shape):
        yield f"{name}.weight_shape is {tensors['weight_shape'].tolist()}, expected {list(shape)}"
        return
    if not sound:
        return
    codes = codes_of(tensors, storage)
    kind = storage.weight_name
    symmetric = storage.bits == 8 and not storage.is_float and not storage.packing
    if symmetric and (codes == -128).any():
        yield f"{name}.{kind} holds the code -128, outside -127..127"
    if storage.bits == 4 and codes.dtype == torch.int8 and not (codes.abs() <= 8).all():
        yield f"{name}.{kind} holds a code outside -8..7"
    values = fp4_values(codes) if storage.has_two_levels else codes.float()
    reach = float(values.abs().max())
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
        suffixes = [s for s in (storage.input_scale_name,) if s is not None]
        suffixes += [
            s for s in ("weight_scale_2", "weight_global_scale") if f"{first}.{s}" in scales
        ]
        if storage.group_size == -1:
            suffixes.append("weight_scale")
        for suffix in suffixes:
            for module in modules[1:]:
                a, b = f"{first}.{suffix}", f"{prefix}{module}.{suffix}"
                if a in scales and b in scales and not torch.equal(scales[a], scales[b]):
                    yield f"{b} differs from {a}; fused kernels need one value"

"""Hugging Face directories: static checks, comparison with the checkpoint, and a reader."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mqat.checkpoints.reader import CheckpointReader
from mqat.quant.scheme import LinearScheme
from mqat.verify.decoder import Cache, Rope, attend, rms_norm
from mqat.verify.hf_layout import MODULES, HfConfig, Storage
from mqat.verify.hf_values import (
    EMBEDDING,
    FINAL_NORM,
    LM_HEAD,
    NORMS,
    codes_of,
    expected_tensors,
    fused_problems,
    module_problems,
    module_values,
    zero_points_of,
)
from mqat.verify.operands import served_input, w4a8_factor
from mqat.verify.trained import TrainedLinear
from mqat.verify.values import same_bytes

_INDEX = "model.safetensors.index.json"
# Megatron linear -> its projections, in row order, and the norm before it.
_OWNERS: dict[str, tuple[tuple[str, ...], str | None]] = {
    "self_attention.linear_qkv": (
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        NORMS[0],
    ),
    "self_attention.linear_proj": (("self_attn.o_proj",), None),
    "mlp.linear_fc1": (("mlp.gate_proj", "mlp.up_proj"), NORMS[1]),
    "mlp.linear_fc2": (("mlp.down_proj",), None),
}


class HfDirectory:
    """The tensors of a directory by name, read one at a time."""

    def __init__(self, directory: Path, config: HfConfig, files: dict[str, str]) -> None:
        self.config = config
        handles = {f: safe_open(directory / f, framework="pt") for f in set(files.values())}
        self._handles = {name: handles[file] for name, file in files.items()}

    def tensor(self, name: str) -> Tensor:
        """One tensor."""
        return self._handles[name].get_tensor(name)

    def module(self, name: str) -> dict[str, Tensor]:
        """Suffix -> tensor of a linear."""
        prefix = f"{name}."
        return {
            full.removeprefix(prefix): self.tensor(full)
            for full in self._handles
            if full.startswith(prefix)
        }


def check_files(directory: Path, config: HfConfig) -> tuple[list[str], dict[str, str]]:
    """Problems with files, index and headers; and which file holds each tensor."""
    present = {file.name for file in directory.glob("*.safetensors")}
    problems: list[str] = []
    files: dict[str, str] = {}
    wanted = {"model.safetensors"}
    if (directory / _INDEX).exists():
        try:
            files = dict(json.loads((directory / _INDEX).read_text("utf-8"))["weight_map"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            return [f"{_INDEX}: unusable ({error!r})"], {}
        wanted = set(files.values())
    problems += [f"{name}: missing" for name in sorted(wanted - present)]
    problems += [f"{name}: stale, not part of this model" for name in sorted(present - wanted)]
    if wanted - present:
        return problems, files
    expected = expected_tensors(config)
    found: dict[str, str] = {}
    for file in sorted(wanted):
        try:
            with safe_open(directory / file, framework="pt") as handle:
                for name in handle.keys():
                    header = handle.get_slice(name)
                    entry = (header.get_dtype(), tuple(header.get_shape()))
                    found[name] = file
                    if name in expected and entry != expected[name]:
                        problems.append(f"{file}: {name} is {entry}, expected {expected[name]}")
        except (OSError, SafetensorError) as error:
            problems.append(f"{file}: truncated or not safetensors ({error})")
            return problems, found
    problems += [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{found[name]}: {name} is not expected" for name in found if name not in expected]
    for name, file in files.items():
        if found.get(name, file) != file:
            problems.append(f"{_INDEX}: {name} is in {found[name]}, not in {file}")
    return problems, found


def check_values(directory: HfDirectory) -> Iterator[str]:
    """What cannot be right in the values, without a reference."""
    config = directory.config
    for name in (EMBEDDING, FINAL_NORM, *([] if config.raw["tie_word_embeddings"] else [LM_HEAD])):
        if not directory.tensor(name).isfinite().all():
            yield f"{name} holds NaN or infinity"
    for layer in range(config.raw["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        scales: dict[str, Tensor] = {}
        for norm in NORMS:
            if not directory.tensor(f"{prefix}{norm}.weight").isfinite().all():
                yield f"{prefix}{norm}.weight holds NaN or infinity"
        for name in config.cache_scales.values():
            if not 0 < float(directory.tensor(prefix + name)) < math.inf:
                yield f"{prefix}{name} is not a positive finite number"
        for module, (rows, cols) in MODULES.items():
            name = prefix + module
            tensors = directory.module(name)
            storage = config.storage.get(name)
            if storage is None:
                for suffix, tensor in tensors.items():
                    if not tensor.isfinite().all():
                        yield f"{name}.{suffix} holds NaN or infinity"
                continue
            shape = (config.size(rows), config.size(cols))
            yield from module_problems(name, tensors, storage, shape)
            scales |= {f"{name}.{s}": t for s, t in tensors.items() if "_scale" in s}
        yield from fused_problems(prefix, scales, config)


def compare_config(config: HfConfig, checkpoint: CheckpointReader) -> Iterator[str]:
    """`config.json` must describe the trained model."""
    model, raw = checkpoint.model, config.raw
    expected = {
        "model_type": model.family,
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_query_groups,
        "head_dim": model.head_dim,
        "rms_norm_eps": model.rms_norm_eps,
        "rope_theta": model.rope_theta,
        "rope_scaling": model.rope_scaling,
        "max_position_embeddings": model.max_position_embeddings,
        "tie_word_embeddings": model.tie_word_embeddings,
    }
    for key, value in expected.items():
        if raw.get(key) != value:
            yield f"config.json: {key}={raw.get(key)!r}, but the checkpoint has {value!r}"
    caches = {scheme.name for scheme in checkpoint.kv_cache.values()}
    if caches != ({"fp8"} if config.cache_scales else set()):
        served = "FP8" if config.cache_scales else "unquantized"
        yield f"config.json: the key/value cache is {served}, but the checkpoint's {sorted(caches)}"


def compare_tensors(directory: HfDirectory, checkpoint: CheckpointReader) -> Iterator[str]:
    """Every tensor against the checkpoint, bit for bit; yields what differs by name."""
    vocab, model = slice(0, checkpoint.model.vocab_size), checkpoint.model
    whole = {EMBEDDING: ("embedding.word_embeddings.weight", (vocab,))}
    if not model.tie_word_embeddings:
        whole[LM_HEAD] = ("output_layer.weight", (vocab,))
    for name, (key, region) in whole.items():
        yield from _same(name, directory.tensor(name), checkpoint.read(key, region))
    key = "decoder.final_layernorm.weight"
    yield from _same(FINAL_NORM, directory.tensor(FINAL_NORM), checkpoint.read(key))
    for layer in range(model.num_layers):
        yield from _compare_cache(directory, checkpoint, layer)
        for linear, (modules, norm) in _OWNERS.items():
            trained = TrainedLinear(checkpoint, layer, linear)
            if norm is not None:
                key = f"decoder.layers.{linear}.layer_norm_weight"
                name = f"model.layers.{layer}.{norm}.weight"
                weight = checkpoint.read(key, (slice(layer, layer + 1),))[0]
                yield from _same(name, directory.tensor(name), weight)
            names = [f"model.layers.{layer}.{module}" for module in modules]
            yield from _compare_linear(directory, trained, names)


def _compare_cache(
    directory: HfDirectory, checkpoint: CheckpointReader, layer: int
) -> Iterator[str]:
    module = f"decoder.layers.{layer}.self_attention.core_attention"
    for kind, suffix in directory.config.cache_scales.items():
        quantizer = "kv" if checkpoint.kv_cache[module].is_shared else kind
        frozen = checkpoint.read(f"quantizers.{module}.{quantizer}_scale")
        name = f"model.layers.{layer}.{suffix}"
        if not same_bytes(directory.tensor(name).reshape(1), frozen):
            yield f"{name} is not the frozen scale"


def _same(name: str, served: Tensor, trained: Tensor) -> Iterator[str]:
    if not same_bytes(served, trained.to(served.dtype)):
        yield f"{name} is not the checkpoint's"


def _serves(storage: Storage, scheme: LinearScheme) -> bool:
    """Whether what is stored can be what was trained; values are compared one by one besides."""
    weight, operand = scheme.weight, scheme.input
    assert weight is not None, "schemes without a quantized weight are not exported"
    trained = (weight.format.bits, weight.format.is_float, weight.is_asymmetric)
    if trained != (storage.bits, storage.is_float, storage.is_asymmetric):
        return False
    names = {-1: "tensor", 0: "channel"}
    if names.get(storage.group_size, f"group:{storage.group_size}") != str(weight.granularity):
        return False
    if operand is None or storage.input is None:
        return operand is None and storage.input is None
    step = "static" if not operand.is_dynamic else str(operand.granularity).split(":")[0]
    step = step.replace("group", "block")
    kind = f"fp{operand.format.bits}" if operand.format.is_float else f"int{operand.format.bits}"
    return storage.input == f"{step} {'u' * operand.is_asymmetric}{kind}"


def _compare_linear(
    directory: HfDirectory, trained: TrainedLinear, names: list[str]
) -> Iterator[str]:
    scheme = trained.scheme
    codes = None if scheme is None else trained.blocks(trained.codes())
    weights = trained.blocks(trained.weight()) if scheme is None else []
    bias = trained.bias()
    biases = [] if bias is None else trained.blocks(bias)
    for part, name in enumerate(names):
        storage, tensors = directory.config.storage.get(name), directory.module(name)
        if ("bias" in tensors) != bool(biases):
            yield f"{name}.bias is in only one of checkpoint and export"
        elif biases:
            yield from _same(f"{name}.bias", tensors["bias"], biases[part])
        if (storage is None) != (scheme is None):
            yield f"{name}: quantized in only one of checkpoint and export"
            continue
        if storage is None or scheme is None or codes is None:
            yield from _same(f"{name}.weight", tensors["weight"], weights[part])
            continue
        if not _serves(storage, scheme):
            yield f"{name}: served as {storage}, trained as {scheme.name}"
            continue
        if not same_bytes(codes_of(tensors, storage), codes[part]):
            yield f"{name}.{storage.weight_name} is not the checkpoint's weight on its grid"
        yield from _compare_scales(name, tensors, storage, trained, part)


def _compare_scales(
    name: str, tensors: Mapping[str, Tensor], storage: Storage, trained: TrainedLinear, part: int
) -> Iterator[str]:
    """Every scale and zero point must be the frozen one; `part` is the projection's row block."""
    scale, served = trained.scale(), tensors["weight_scale"].float()
    if storage.has_two_levels:
        served = served * trained.frozen("weight_global_scale")
    scale = scale if storage.group_size == -1 else trained.blocks(scale)[part]
    if not same_bytes(served.reshape(scale.shape), scale):
        yield f"{name}.weight_scale is not the frozen scale"
    if storage.is_asymmetric:
        zeros = trained.blocks(trained.frozen("weight_zero_point"))[part] - (1 << storage.bits - 1)
        if not same_bytes(zero_points_of(tensors, storage), zeros.to(torch.int8)):
            yield f"{name}.weight_zero_point is not the frozen zero point"
    wanted: dict[str, Tensor] = {}
    if storage.has_two_levels and storage.is_modelopt:
        wanted["weight_scale_2"] = trained.frozen("weight_global_scale")
        wanted["input_scale"] = trained.frozen("input_global_scale")
    elif storage.has_two_levels:
        wanted["weight_global_scale"] = 1 / trained.frozen("weight_global_scale")
        wanted["input_global_scale"] = 1 / trained.frozen("input_global_scale")
    elif storage.input_scale_name is not None:
        wanted[storage.input_scale_name] = trained.frozen("input_scale")
    if "weight_scale_2" in tensors and not storage.has_two_levels:
        wanted["weight_scale_2"] = w4a8_factor(trained.scale())
    for suffix, frozen in wanted.items():
        if not same_bytes(tensors[suffix].reshape(1), frozen):
            yield f"{name}.{suffix} is not the frozen scale"


class HfReader:
    """Runs a checked directory in float32, inputs quantized as served, a layer in memory at a time."""

    def __init__(self, directory: HfDirectory) -> None:
        self.directory = directory
        self.config = directory.config

    def _linear(self, name: str, x: Tensor) -> Tensor:
        tensors, storage = self.directory.module(name), self.config.storage.get(name)
        bias = tensors.get("bias", torch.zeros(1)).float()
        if storage is None:
            return x @ tensors["weight"].float().t() + bias
        step = None if storage.input_scale_name is None else tensors[storage.input_scale_name]
        if step is not None and storage.input_scale_name == "input_global_scale":
            step = 1 / step
        return served_input(x, storage.input, step) @ module_values(tensors, storage).t() + bias

    def _cache(self, prefix: str) -> Cache | None:
        names = self.config.cache_scales
        if not names:
            return None
        key, value = (self.directory.tensor(prefix + names[kind]) for kind in ("key", "value"))
        return Cache(True, key, value)

    def _layer(self, prefix: str, x: Tensor, rope: Rope) -> Tensor:
        eps = float(self.config.raw["rms_norm_eps"])
        first, second = (self.directory.tensor(f"{prefix}{norm}.weight") for norm in NORMS)
        normed = rms_norm(x, first, eps)
        q, k, v = (self._linear(f"{prefix}self_attn.{p}_proj", normed) for p in "qkv")
        merged = attend(q, k, v, rope, self._cache(prefix))
        x = x + self._linear(f"{prefix}self_attn.o_proj", merged)
        normed = rms_norm(x, second, eps)
        gate, up = (self._linear(f"{prefix}mlp.{p}_proj", normed) for p in ("gate", "up"))
        return x + self._linear(f"{prefix}mlp.down_proj", F.silu(gate) * up)

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor:
        """Next-token logits, float32 [b, s, V], for tokens int64 [b, s]."""
        raw = self.config.raw
        rope = Rope(int(raw["head_dim"]), raw["rope_theta"], raw["rope_scaling"])
        embedding = self.directory.tensor(EMBEDDING)
        x = embedding[tokens].float()
        for layer in range(raw["num_hidden_layers"]):
            x = self._layer(f"model.layers.{layer}.", x, rope)
        x = rms_norm(x, self.directory.tensor(FINAL_NORM), float(raw["rms_norm_eps"]))
        head = embedding if raw["tie_word_embeddings"] else self.directory.tensor(LM_HEAD)
        return x @ head.float().t()

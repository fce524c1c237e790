"""Hugging Face directories: names, shards, `config.json` and what goes with it.

Projections are apart (`q_proj`, `k_proj`, ...) and whole: servers fuse and cut them as they like. A
fused linear was trained on one grid, so its parts share their per-tensor scales.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mqat import __version__
from mqat.checkpoints.reader import CheckpointReader
from mqat.errors import UserError
from mqat.export import compressed, modelopt
from mqat.export.kv_cache import cache_scheme, plan_scales, quant_algo
from mqat.export.linears import Maker, ServedLinear, unquantized, with_bias
from mqat.export.names import (
    HF_EMBEDDING,
    HF_FINAL_NORM,
    HF_LAYER,
    HF_LINEARS,
    HF_LM_HEAD,
    HF_NORMS,
    LINEARS,
)
from mqat.export.rank_files import plan_norm, plan_table
from mqat.export.reshard import (
    InferenceRank,
    Rows,
    gate_rows,
    key_rows,
    query_rows,
    up_rows,
    value_rows,
)
from mqat.export.stream import TensorPlan
from mqat.models.decoder import DecoderConfig
from mqat.quant.kv_cache import KvCacheScheme
from mqat.quant.scheme import LinearScheme

SHARD_BYTES = 5_000_000_000
STYLES = ("compressed-tensors", "modelopt")
_WHOLE = InferenceRank(0, 1, 0, 1)


def check_exportable(
    model: DecoderConfig, layers: Mapping[str, LinearScheme], *, style: str = "compressed-tensors"
) -> None:
    """Refuses what the style cannot hold; meant to run before training.

    Raises:
        ValueError: Names the setting, and what would work.
    """
    if style not in STYLES:
        raise UserError(f"style={style!r}: must be one of {', '.join(STYLES)}.")
    if style == "modelopt":
        modelopt.check_exportable(layers)
    else:
        compressed.check_exportable(model, layers)


def module_schemes(
    model: DecoderConfig, layers: Mapping[str, LinearScheme]
) -> dict[str, LinearScheme | None]:
    """Hugging Face module name -> scheme, for every linear of the decoder, in model order."""
    return {
        HF_LAYER.format(i=layer) + module: layers.get(f"decoder.layers.{layer}.{linear}")
        for layer in range(model.num_layers)
        for linear in LINEARS
        for module in HF_LINEARS[linear]
    }


def _rows_of(model: DecoderConfig) -> dict[str, list[Rows]]:
    """Megatron linear -> checkpoint rows of each of its Hugging Face modules."""
    hidden = [slice(0, model.hidden_size)]
    return {
        "self_attention.linear_qkv": [f(model, _WHOLE) for f in (query_rows, key_rows, value_rows)],
        "self_attention.linear_proj": [hidden],
        "mlp.linear_fc1": [f(model, _WHOLE) for f in (gate_rows, up_rows)],
        "mlp.linear_fc2": [hidden],
    }


def plan_tensors(reader: CheckpointReader, dtype: torch.dtype, style: str) -> list[TensorPlan]:
    """Every tensor of the model, in model order."""
    model = reader.model
    plans = [plan_table(reader, HF_EMBEDDING, "embedding.word_embeddings", dtype, _WHOLE)]
    for layer in range(model.num_layers):
        plans += _plan_layer(reader, dtype, style, layer)
    plans.append(plan_norm(reader, HF_FINAL_NORM, None, dtype))
    if not model.tie_word_embeddings:
        plans.append(plan_table(reader, HF_LM_HEAD, "output_layer", dtype, _WHOLE))
    return plans


def _plan_layer(
    reader: CheckpointReader, dtype: torch.dtype, style: str, layer: int
) -> Iterator[TensorPlan]:
    prefix = HF_LAYER.format(i=layer)
    for linear, norm in HF_NORMS.items():
        yield plan_norm(reader, f"{prefix}{norm}.weight", (layer, linear), dtype)
    rows = _rows_of(reader.model)
    for linear in LINEARS:
        cols = slice(0, reader.model.linear_shape(linear)[1])
        tensors = _tensors(reader.layers.get(f"decoder.layers.{layer}.{linear}"), style)
        for module, part_rows in zip(HF_LINEARS[linear], rows[linear], strict=True):
            part = ServedLinear(reader, layer, linear, part_rows, cols, dtype)
            for suffix, make in with_bias(part, tensors).items():
                yield make(part).named(f"{prefix}{module}.{suffix}")
    yield from plan_scales(reader, style, layer, prefix)


def _tensors(scheme: LinearScheme | None, style: str) -> Mapping[str, Maker]:
    if scheme is None:
        return {"weight": unquantized}
    if style == "modelopt":
        return modelopt.FORMATS[scheme.name].tensors
    return compressed.FORMATS[scheme.name].tensors


def shard(plans: Sequence[TensorPlan], max_bytes: int) -> dict[str, list[TensorPlan]]:
    """File name -> tensors; consecutive tensors share a file while it stays within `max_bytes`.

    Raises:
        ValueError: `max_bytes` is not positive.
    """
    if max_bytes < 1:
        raise UserError(f"max_shard_bytes={max_bytes}: must be at least 1.")
    files: list[list[TensorPlan]] = [[]]
    size = 0
    for plan in plans:
        if files[-1] and size + plan.num_bytes > max_bytes:
            files.append([])
            size = 0
        files[-1].append(plan)
        size += plan.num_bytes
    if len(files) == 1:
        return {"model.safetensors": files[0]}
    return {
        f"model-{number:05d}-of-{len(files):05d}.safetensors": file
        for number, file in enumerate(files, start=1)
    }


def texts(
    model: DecoderConfig,
    layers: Mapping[str, LinearScheme],
    dtype: str,
    style: str,
    tokenizer: Path,
    shards: Mapping[str, Sequence[TensorPlan]],
    kv_cache: Mapping[str, KvCacheScheme],
) -> dict[str, str]:
    """The JSON files beside the weights, by name."""
    special = special_tokens(tokenizer)
    config = model.to_hf(dtype) | special | {"producer": {"name": "mqat", "version": __version__}}
    result: dict[str, Any] = {"config.json": config}
    if not (tokenizer / "generation_config.json").is_file():
        result["generation_config.json"] = {"_from_model_config": True} | special
    if layers:
        modules = module_schemes(model, layers)
        if style == "modelopt":
            config["quantization_config"] = modelopt.quantization_config(modules)
            quantized = modelopt.hf_quant_config(modules)
            quantized["quantization"]["kv_cache_quant_algo"] = quant_algo(kv_cache)
            result["hf_quant_config.json"] = quantized
        else:
            config["quantization_config"] = compressed.quantization_config(modules)
        config["quantization_config"] |= cache_scheme(kv_cache, style)
    if len(shards) > 1:
        result["model.safetensors.index.json"] = {
            "metadata": {"total_size": sum(p.num_bytes for ps in shards.values() for p in ps)},
            "weight_map": {plan.name: name for name, plans in shards.items() for plan in plans},
        }
    return {name: json.dumps(value, indent=2) + "\n" for name, value in result.items()}


def special_tokens(tokenizer: Path) -> dict[str, Any]:
    """`bos_token_id`, `eos_token_id`, `pad_token_id`, as far as the tokenizer's files tell.

    The generation settings of the imported model win, where the checkpoint has them: an instruct
    model stops at several tokens, of which the tokenizer knows one.
    """
    keys = ("bos_token_id", "eos_token_id", "pad_token_id")
    settings = _json(tokenizer / "generation_config.json")
    names = _json(tokenizer / "tokenizer_config.json")
    added = _json(tokenizer / "tokenizer.json").get("added_tokens") or []
    ids = {token["content"]: token["id"] for token in added}
    found = {}
    for key in keys:
        name = names.get(key.removesuffix("_id"))
        name = name.get("content") if isinstance(name, dict) else name
        value = settings.get(key, ids.get(name))
        if value is not None:
            found[key] = value
    return found


def _json(file: Path) -> dict[str, Any]:
    """A JSON object, or nothing if there is no such file.

    Raises:
        ValueError: The file is not JSON.
    """
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: not JSON ({error}).") from error
    return value if isinstance(value, dict) else {}

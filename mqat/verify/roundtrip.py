"""Every exported tensor, compared bit for bit with what the checkpoint says it must be.

Ranks are joined back into whole tensors (the inverse of what an exporter does), so a swapped, shifted,
mis-scaled or mis-packed tensor cannot pass: codes times scales must be the trained weight's grid value,
and every scale the frozen one.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from mqat.export.slices import CheckpointReader
from mqat.models.llama import LINEARS
from mqat.quant.functional import dequantize, quantize
from mqat.quant.scheme import LinearScheme
from mqat.verify.layout import ROW_PARALLEL, ServedConfig

_MODULES = {
    "self_attention.linear_qkv": ("attention.qkv",),
    "self_attention.linear_proj": ("attention.dense",),
    "mlp.linear_fc1": ("mlp.fc", "mlp.gate"),
    "mlp.linear_fc2": ("mlp.proj",),
}


def compare_with_checkpoint(
    directory: Path, config: ServedConfig, checkpoint: CheckpointReader
) -> list[str]:
    """Problems, each naming the tensor; the directory must have passed the static checks."""
    handles = [
        safe_open(directory / f"rank{rank}.safetensors", framework="pt")
        for rank in range(config.tp * config.pp)
    ]
    problems = list(_compare_top(handles, config, checkpoint))
    for layer in range(checkpoint.model.num_layers):
        stage, local = divmod(layer, config.layers_per_stage)
        ranks = handles[stage * config.tp : (stage + 1) * config.tp]
        prefix = f"transformer.layers.{local}."
        where = f"stage {stage}: "
        for linear in LINEARS:
            found = _compare_linear(ranks, config, checkpoint, prefix, layer, linear)
            problems += [where + problem for problem in found]
        norms = {"input_layernorm": "self_attention.linear_qkv", "post_layernorm": "mlp.linear_fc1"}
        for name, owner in norms.items():
            wanted = checkpoint.read(
                f"decoder.layers.{owner}.layer_norm_weight", (slice(layer, layer + 1),)
            )[0]
            served = ranks[0].get_tensor(f"{prefix}{name}.weight")
            if not torch.equal(served, wanted.to(served.dtype)):
                problems.append(f"{where}{prefix}{name}.weight is not the checkpoint's")
    return problems


def _compare_top(
    handles: list[safe_open], config: ServedConfig, checkpoint: CheckpointReader
) -> Iterator[str]:
    vocab = checkpoint.model.vocab_size
    head = "embedding.word_embeddings" if checkpoint.model.tie_word_embeddings else "output_layer"
    tables = (
        ("transformer.vocab_embedding.weight", "embedding.word_embeddings", handles[: config.tp]),
        ("lm_head.weight", head, handles[-config.tp :]),
    )
    for name, module, ranks in tables:
        joined = torch.cat([handle.get_tensor(name) for handle in ranks])
        wanted = checkpoint.read(f"{module}.weight", (slice(0, vocab),)).to(joined.dtype)
        if not torch.equal(joined[:vocab], wanted):
            yield f"{name} is not the checkpoint's"
        if joined[vocab:].any():
            yield f"{name} has padding rows that are not zero"
    served = handles[-1].get_tensor("transformer.ln_f.weight")
    if not torch.equal(served, checkpoint.read("decoder.final_layernorm.weight").to(served.dtype)):
        yield "transformer.ln_f.weight is not the checkpoint's"


def _nibbles(packed: Tensor) -> Tensor:
    rows = torch.stack([packed % 16, packed.view(torch.uint8) // 16], dim=1).flatten(0, 1)
    codes = rows.to(torch.int16)
    return torch.where(codes >= 8, codes - 16, codes).to(torch.int8)


def _split_trained(tensor: Tensor, checkpoint: CheckpointReader, linear: str) -> list[Tensor]:
    """Rows of a trained tensor as the separate matrices that are served: [q, k, v] or [gate, up]."""
    model = checkpoint.model
    if linear == "mlp.linear_fc1":
        return list(tensor.chunk(2, dim=0))
    if linear != "self_attention.linear_qkv":
        return [tensor]
    per_group = model.num_attention_heads // model.num_query_groups
    grouped = tensor.unflatten(0, (model.num_query_groups, per_group + 2, model.head_dim))
    parts = grouped.split([per_group, 1, 1], dim=1)
    return [part.flatten(0, 2) for part in parts]


def _join_served(
    tensors: list[Tensor], config: ServedConfig, module: str, *, columns: bool
) -> list[Tensor]:
    """Rank tensors joined: one matrix, or [q, k, v]; checks copied key/value heads on the way."""
    if module in ROW_PARALLEL:
        return [torch.cat(tensors, dim=1) if columns else tensors[0]]
    if module != "attention.qkv":
        return [torch.cat(tensors)]
    d = int(config.raw["head_size"])
    heads = int(config.raw["num_attention_heads"]) // config.tp
    copies = config.key_value_heads_per_rank
    split = [t.split([heads * d, copies * d, copies * d]) for t in tensors]
    stride = max(config.tp // int(config.raw["num_key_value_heads"]), 1)
    query = torch.cat([part[0] for part in split])
    key, value = (torch.cat([part[i] for part in split[::stride]]) for i in (1, 2))
    return [query, key, value]


def _compare_linear(
    ranks: list[safe_open],
    config: ServedConfig,
    checkpoint: CheckpointReader,
    prefix: str,
    layer: int,
    linear: str,
) -> Iterator[str]:
    name = f"decoder.layers.{layer}.{linear}"
    scheme = checkpoint.layers.get(name)
    lead = (slice(layer, layer + 1),)
    trained = checkpoint.read(f"decoder.layers.{linear}.weight", lead)[0]
    scale = codes = None
    if scheme is not None and scheme.weight is not None:
        scale = checkpoint.read(f"quantizers.{name}.weight_scale")
        codes = quantize(trained, scale, scheme.weight.format, scheme.weight.granularity)
        if scheme.name == "int8_wo":
            trained = dequantize(codes, scale, scheme.weight.granularity, trained.dtype)
    modules = _MODULES[linear]
    expected_parts = _split_trained(codes if codes is not None else trained, checkpoint, linear)
    for index, module in enumerate(modules):
        full = prefix + module
        parts = expected_parts[index : index + 1] if len(modules) > 1 else expected_parts
        quantized = config.is_quantized(full)
        if quantized != (scheme is not None):
            yield f"{full}: quantized in only one of checkpoint and export"
            continue
        served = [handle.get_tensor(f"{full}.weight") for handle in ranks]
        if scheme is None or scheme.name == "int8_wo":
            dense = _split_trained(trained, checkpoint, linear)
            parts = dense[index : index + 1] if len(modules) > 1 else dense
            wanted = [part.to(served[0].dtype) for part in parts]
        else:
            wanted = parts
            if scheme.name == "int4":
                served = [_nibbles(tensor) for tensor in served]
        joined = _join_served(served, config, module, columns=True)
        if not all(torch.equal(_bits(a), _bits(b)) for a, b in zip(joined, wanted, strict=True)):
            yield f"{full}.weight is not the checkpoint's weight on its grid"
        if scheme is not None and scheme.name != "int8_wo":
            assert scale is not None
            yield from _compare_scales(
                ranks, config, checkpoint, full, name, linear, index, scheme, scale
            )


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor


def _compare_scales(
    ranks: list[safe_open],
    config: ServedConfig,
    checkpoint: CheckpointReader,
    full: str,
    name: str,
    linear: str,
    index: int,
    scheme: LinearScheme,
    scale: Tensor,
) -> Iterator[str]:
    module = full.split(".", 3)[3]
    served = [handle.get_tensor(f"{full}.weights_scaling_factor").float() for handle in ranks]
    if scale.numel() == 1:
        same = all(torch.equal(tensor, scale) for tensor in served)
    else:
        parts = _split_trained(scale, checkpoint, linear)
        wanted = parts[index : index + 1] if linear == "mlp.linear_fc1" else parts
        joined = _join_served(served, config, module, columns=scale.dim() == 2)
        same = all(torch.equal(a, b) for a, b in zip(joined, wanted, strict=True))
    if not same:
        yield f"{full}.weights_scaling_factor is not the frozen scale"
    if scheme.input is not None:
        frozen = checkpoint.read(f"quantizers.{name}.input_scale")
        for handle in ranks:
            if not torch.equal(handle.get_tensor(f"{full}.activation_scaling_factor"), frozen):
                yield f"{full}.activation_scaling_factor is not the frozen scale"

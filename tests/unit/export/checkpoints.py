"""Small checkpoints written directly with torch, with Megatron's keys, for export and verify tests."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from mqat.checkpoints.manifest import describe_files
from mqat.models.decoder import DecoderConfig
from mqat.models.schemes import Scheme, kv_cache_schemes, linear_schemes
from mqat.models.structure import CORE_ATTENTION, DENSE_LINEARS, is_table_key
from mqat.quant.algorithm import named_scheme
from mqat.quant.kv_cache import kv_cache_scheme
from mqat.quant.qparams import statistic_of
from mqat.quant.quantizer import Quantizer
from mqat.quant.scales import compute_scale
from mqat.quant.scheme import LinearScheme

LINEARS = tuple(linear.name for linear in DENSE_LINEARS)

# Legal for INT4 groups of 64 up to inference TP 4, where the two key/value heads are copied.
TINY = DecoderConfig(
    vocab_size=301, hidden_size=256, intermediate_size=512, num_layers=4, num_attention_heads=4,
    num_query_groups=2, head_dim=64, max_position_embeddings=128, tie_word_embeddings=True,
)  # fmt: skip
UNTIED = replace(TINY, tie_word_embeddings=False)
BIASED = replace(UNTIED, biases=LINEARS)  # Llama with attention_bias and mlp_bias
MIXTRAL = replace(
    UNTIED, family="mixtral", num_layers=2, hidden_size=128, num_experts=4, experts_per_token=2,
    intermediate_size=192, expert_intermediate_size=192,
)  # fmt: skip
QWEN3_MOE = replace(
    MIXTRAL, family="qwen3_moe", intermediate_size=320, expert_intermediate_size=64, num_experts=5,
    experts_per_token=3, normalizes_expert_weights=False, tie_word_embeddings=True,
)  # fmt: skip
QWEN2 = replace(TINY, family="qwen2", biases=LINEARS[:1])
EXPORTABLE = ("null", "int8", "int8_wo", "int4", "fp8", "fp8_pc_pt", "nvfp4")


def all_layers(
    algorithm: str, model: DecoderConfig = TINY, group_size: int = 64
) -> dict[str, LinearScheme]:
    """Every linear quantized alike; empty for `null`."""
    # W4A8 kernels know groups of 128 only.
    scheme = named_scheme(algorithm, group_size=128 if algorithm == "w4a8_awq" else group_size)
    layers = range(model.num_layers)
    names = [f"decoder.layers.{i}.{linear.name}" for i in layers for linear in model.linears_of(i)]
    return {} if scheme is None else dict.fromkeys(names, scheme)


def all_caches(name: str, scales: str = "shared", model: DecoderConfig = TINY) -> dict[str, Scheme]:
    """Every layer's key/value cache quantized; to be merged into `all_layers`."""
    scheme = kv_cache_scheme(name, scales)
    return {f"decoder.layers.{i}.{CORE_ATTENTION.name}": scheme for i in range(model.num_layers)}


def tensors_of(
    model: DecoderConfig, layers: Mapping[str, Scheme], dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Random weights and frozen scales; the weights moved on after calibration, as in training."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for key, shape in model.checkpoint_shapes().items():
        if "norm" in key:
            state[key] = 1 + 0.1 * torch.randn(shape, generator=generator)
            continue
        if is_table_key(key):
            shape = (shape[0] + 3, *shape[1:])  # Megatron's padding of the vocabulary
        state[key] = torch.randn(shape, generator=generator) * 1.5 / shape[-1] ** 0.5
    for name, scheme in linear_schemes(layers).items():
        index, linear = name.removeprefix("decoder.layers.").split(".", 1)
        row = model.linear(linear)
        key, lead = model.place(row.key, int(index))
        weight = state[key][(*lead, *row.stored_at)].view(row.shape(model))
        assert scheme.weight is not None
        quantizers = {"weight": Quantizer(scheme.weight, tuple(weight.shape), name)}
        statistic = statistic_of(weight, quantizers["weight"].scheme)
        quantizers["weight"].freeze_(statistic, statistic.amax().reshape(1))
        if scheme.input is not None:
            quantizers["input"] = Quantizer(scheme.input, None, name)
            quantizers["input"].freeze_(3 + torch.rand(1, generator=generator))
        for kind, quantizer in quantizers.items():
            for part, tensor in quantizer.frozen_tensors.items():
                state[f"quantizers.{name}.{kind}_{part}"] = tensor.clone()
        weight.mul_(0.9).add_(0.01 * torch.randn(weight.shape, generator=generator))
    for name, cache in kv_cache_schemes(layers).items():
        for kind, operand in cache.operands.items():
            amax = 2 + torch.rand(1, generator=generator)
            state[f"quantizers.{name}.{kind}_scale"] = compute_scale(
                amax, operand.format, scale_dtype=operand.scale_dtype
            )
    frozen = {key: value for key, value in state.items() if key.startswith("quantizers.")}
    return {key: value.to(dtype) for key, value in state.items()} | frozen


class _InChunks(dcp.DefaultSavePlanner):
    """Saves every tensor as several chunks, as the ranks of a training job do."""

    def __init__(self, cuts: int) -> None:
        super().__init__(flatten_state_dict=False)
        self.cuts = cuts

    def create_local_plan(self) -> SavePlan:
        items = []
        for key, tensor in self.state_dict.items():
            spans = [[(0, n)] for n in tensor.shape]
            for dim in range(min(2, tensor.dim())):  # layers apart, and rows cut unevenly
                step = -(-tensor.shape[dim] // self.cuts)
                spans[dim] = [
                    (start, min(step, tensor.shape[dim] - start))
                    for start in range(0, tensor.shape[dim], step)
                ]
            corners = torch.cartesian_prod(*[torch.arange(len(s)) for s in spans])
            for corner in corners.reshape(-1, tensor.dim()).tolist():
                offsets, sizes = zip(
                    *(span[i] for span, i in zip(spans, corner, strict=True)), strict=True
                )
                chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
                data = TensorWriteData(
                    chunk, TensorProperties.create_from_tensor(tensor), tensor.size()
                )
                index = MetadataIndex(key, chunk.offsets)
                items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))
        return SavePlan(items)

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        chunk = write_item.tensor_data.chunk
        region = tuple(slice(o, o + n) for o, n in zip(chunk.offsets, chunk.sizes, strict=True))
        return self.state_dict[write_item.index.fqn][region].clone()


def describe(path: Path, **changes: object) -> None:
    """(Re)writes `mqat.json` with fresh checksums, so that a test may damage what lies beneath."""
    file = path / "mqat.json"
    description = json.loads(file.read_text()) if file.exists() else {}
    names = [str(f.relative_to(path)) for f in path.rglob("*") if f.is_file() and f != file]
    description |= changes | {"files": describe_files(path, names)}
    file.write_text(json.dumps(description))


def write_checkpoint(
    path: Path,
    model: DecoderConfig,
    layers: Mapping[str, Scheme],
    *,
    dtype: torch.dtype = torch.float32,
    cuts: int = 1,
    tensors: dict[str, Tensor] | None = None,
) -> Path:
    """A complete checkpoint directory, each tensor in `cuts` pieces along its first two dimensions."""
    state = tensors_of(model, layers, dtype) if tensors is None else tensors
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about saving without a process group
        dcp.save(state, checkpoint_id=path, planner=_InChunks(cuts), no_dist=True)
    tokenizer = path / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.json").write_text("{}")
    (tokenizer / "additional_chat_templates").mkdir()
    (tokenizer / "additional_chat_templates" / "tools.jinja").write_text("{{ messages }}")
    quantization = None
    if layers:
        schemes = {name: scheme.to_dict() for name, scheme in layers.items()}
        quantization = {"algorithm": next(iter(layers.values())).name, "layers": schemes}
    describe(
        path,
        format_version=1,
        family=model.family,
        model=model.to_dict(),
        params_dtype=str(dtype).removeprefix("torch."),
        iteration=0,
        quantization=quantization,
    )
    return path

"""TensorRT-LLM checkpoints: names, `config.json`, and the tensors of one rank.

Facts of the format (TensorRT-LLM 0.17 to 1.2): `models/modeling_utils.py` and
`quantization/{quantize,layers}.py` of NVIDIA/TensorRT-LLM. Scaling factors multiply when
dequantizing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from mqat import __version__
from mqat.export.reshard import (
    InferenceRank,
    Rows,
    even_part,
    gate_rows,
    qkv_rows,
    up_rows,
    vocab_rows,
)
from mqat.export.slices import CheckpointReader
from mqat.models.llama import (
    LINEARS,
    TRTLLM_ARCHITECTURE,
    TRTLLM_EMBEDDING,
    TRTLLM_FINAL_NORM,
    TRTLLM_LAYER,
    TRTLLM_LINEARS,
    TRTLLM_LM_HEAD,
    TRTLLM_NORMS,
    LlamaConfig,
)
from mqat.parallel.layout import linear_of
from mqat.quant.functional import dequantize, quantize
from mqat.quant.granularity import PerChannel, PerGroup, PerTensor
from mqat.quant.packing import pack_int4
from mqat.quant.scheme import LinearScheme, TensorScheme

DTYPES = ("bfloat16", "float16", "float32")
QUANT_ALGORITHMS = {
    "int8": "W8A8_SQ_PER_CHANNEL",
    "int8_wo": "W8A16",
    "int4": "W4A16_AWQ",
    "fp8": "FP8",
}
_INSTEAD = {
    "int4_w_int8_a": "TensorRT-LLM has no INT4 weights with INT8 activations: use int8 (W8A8) or "
    "int4 (weight-only)."
}
# What TensorRT-LLM leaves unquantized; a list in config.json replaces it as a whole.
_NEVER_QUANTIZED = (
    "*lm_head",
    "*router",
    "*vocab_embedding",
    "*position_embedding",
    "*block_embedding",
    "*shared_expert_gate",
)


def loader_warning(layers: Mapping[str, LinearScheme]) -> str | None:
    """What the user must know about formats that the loader changes, or None."""
    if any(scheme.name == "int8_wo" for scheme in layers.values()):
        return (
            "W8A16 checkpoints hold unquantized weights: TensorRT-LLM quantizes them again at load "
            "time, with amax/128 of each output channel on each rank. mqat trains on that grid, but "
            "a channel whose largest code there is not -128 is rounded a second time. Use int8 or "
            "int4 where served weights must be exactly the trained ones."
        )
    return None


def _algorithm(layers: Mapping[str, LinearScheme]) -> str | None:
    """The one algorithm of all quantized linears; None when there is none.

    Raises:
        ValueError: Several at once, or one that TensorRT-LLM lacks.
    """
    names = sorted({scheme.name for scheme in layers.values()})
    if not names:
        return None
    for name in names:
        if name not in QUANT_ALGORITHMS:
            reason = _INSTEAD.get(name, f"exportable algorithms: {sorted(QUANT_ALGORITHMS)}.")
            raise ValueError(f"quantization.algorithm={name} cannot be exported. {reason}")
    if len(names) > 1:
        raise ValueError(
            f"quantization.rules mix {names} in one model; a TensorRT-LLM checkpoint holds one "
            "algorithm and unquantized layers. Use null in the rules, or export.format=null."
        )
    return names[0]


def excluded_modules(model: LlamaConfig, layers: Mapping[str, LinearScheme], pp: int) -> list[str]:
    """Exact module names of linears that a policy left unquantized, after the built-in list.

    Raises:
        ValueError: With `pp` > 1 the names are local to a stage, so every stage must agree.
    """
    per_stage = model.num_layers // pp
    by_stage: list[set[str]] = [set() for _ in range(pp)]
    for layer in range(model.num_layers):
        for linear in LINEARS:
            if f"decoder.layers.{layer}.{linear}" not in layers:
                prefix = TRTLLM_LAYER.format(i=layer % per_stage)
                by_stage[layer // per_stage] |= {prefix + m for m in TRTLLM_LINEARS[linear]}
    if any(stage != by_stage[0] for stage in by_stage):
        raise ValueError(
            f"export.inference_pipeline_parallel={pp}: quantization.rules leave different layers "
            "unquantized in different stages, which TensorRT-LLM cannot express (its layer names "
            "restart in every stage). Export with inference_pipeline_parallel=1."
        )
    return [*_NEVER_QUANTIZED, *sorted(by_stage[0])]


def check_exportable(
    model: LlamaConfig, layers: Mapping[str, LinearScheme], *, tp: int, pp: int
) -> None:
    """Refuses what the format cannot hold; meant to run before training.

    Raises:
        ValueError: Names the setting, the sizes, and what would work.
    """
    for key, size in (("tensor", tp), ("pipeline", pp)):
        if size < 1:
            raise ValueError(f"export.inference_{key}_parallel={size}: must be at least 1.")
    heads, groups = model.num_attention_heads, model.num_query_groups
    fits = heads % tp == 0 and model.intermediate_size % tp == 0
    if not fits or (groups % tp and tp % groups):
        raise ValueError(
            f"export.inference_tensor_parallel={tp} does not fit num_attention_heads={heads}, "
            f"num_query_groups={groups}, intermediate_size={model.intermediate_size}: it must "
            "divide heads and intermediate size, and divide the groups or be a multiple of them."
        )
    if model.num_layers % pp:
        raise ValueError(
            f"export.inference_pipeline_parallel={pp} does not divide num_layers="
            f"{model.num_layers}."
        )
    if _algorithm(layers) is None:
        return
    excluded_modules(model, layers, pp)
    _group_size(layers)
    for name, scheme in layers.items():
        granularity = scheme.weight.granularity if scheme.weight else None
        if isinstance(granularity, PerGroup):
            _check_awq(model, name, granularity.size, tp)


def _group_size(layers: Mapping[str, LinearScheme]) -> int | None:
    """The one group size of all quantized weights; None when they have none."""
    sizes = {
        scheme.weight.granularity.size
        for scheme in layers.values()
        if scheme.weight and isinstance(scheme.weight.granularity, PerGroup)
    }
    if len(sizes) > 1:
        raise ValueError(
            f"quantization.group_size differs between layers: {sorted(sizes)}. A TensorRT-LLM "
            "checkpoint has one group size; use the same for all layers."
        )
    return next(iter(sizes), None)


def _check_awq(model: LlamaConfig, name: str, group_size: int, tp: int) -> None:
    """TensorRT-LLM's size rule for W4A16_AWQ (quantization/layers.py pads otherwise)."""
    if group_size not in (64, 128):
        raise ValueError(
            f"{name}: group_size={group_size}; TensorRT-LLM's INT4 kernels support 64 and 128 only."
        )
    linear = linear_of(name)
    out_features, in_features = model.linear_shape(linear)
    if linear == "self_attention.linear_qkv":
        copies = max(model.num_query_groups, tp)
        out_features = (model.num_attention_heads + 2 * copies) * model.head_dim
    if linear == "mlp.linear_fc1":
        out_features //= 2
    multiple = max(64, group_size) * tp
    for what, size in (("in_features", in_features), ("out_features", out_features)):
        if size % multiple:
            fitting = [g for g in (64, 128) if size % (g * tp) == 0]
            raise ValueError(
                f"{name}: {what}={size} is not a multiple of {multiple} (= max(64, group_size="
                f"{group_size}) x export.inference_tensor_parallel={tp}), as TensorRT-LLM's INT4 "
                f"kernels need. Group sizes that fit here: {fitting or 'none at this size'}; or "
                "use a smaller export.inference_tensor_parallel."
            )


def config_json(
    model: LlamaConfig, layers: Mapping[str, LinearScheme], *, tp: int, pp: int, dtype: str
) -> dict[str, Any]:
    """The `config.json` of a checkpoint directory."""
    algorithm = _algorithm(layers)
    quantization: dict[str, Any] = {"quant_algo": None, "kv_cache_quant_algo": None}
    if algorithm is not None:
        quantization["quant_algo"] = QUANT_ALGORITHMS[algorithm]
        quantization["exclude_modules"] = excluded_modules(model, layers, pp)
    if algorithm == "int4":
        quantization |= {
            "group_size": _group_size(layers),
            "has_zero_point": False,
            "pre_quant_scale": True,
        }
    rotary_scaling = None
    if model.rope_scaling is not None:
        rotary_scaling = {"type": "llama3"} | {
            key: value for key, value in model.rope_scaling.items() if key != "rope_type"
        }
    return {
        "producer": {"name": "mqat", "version": __version__},
        "architecture": TRTLLM_ARCHITECTURE,
        "dtype": dtype,
        "logits_dtype": "float32",
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.max_position_embeddings,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_query_groups,
        "head_size": model.head_dim,
        "hidden_act": "silu",
        "norm_epsilon": model.rms_norm_eps,
        "qk_layernorm": False,
        "attn_bias": False,
        "mlp_bias": False,
        "position_embedding_type": "rope_gpt_neox",
        "rotary_base": model.rope_theta,
        "rotary_scaling": rotary_scaling,
        "use_parallel_embedding": tp > 1,
        "embedding_sharding_dim": 0,
        "share_embedding_table": False,
        "mapping": {"world_size": tp * pp, "tp_size": tp, "pp_size": pp},
        "quantization": quantization,
    }


class RankTensors:
    """Produces the tensors of one rank file, one linear at a time."""

    def __init__(self, reader: CheckpointReader, rank: InferenceRank, dtype: str) -> None:
        self.reader = reader
        self.model = reader.model
        self.rank = rank
        self.dtype: torch.dtype = getattr(torch, dtype)

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) in file order."""
        if self.rank.is_first_stage:
            yield f"{TRTLLM_EMBEDDING}.weight", self._table("embedding.word_embeddings")
        for local, layer in enumerate(self.rank.layers(self.model)):
            yield from self._layer(TRTLLM_LAYER.format(i=local), layer)
        if self.rank.is_last_stage:
            yield f"{TRTLLM_FINAL_NORM}.weight", self._float("decoder.final_layernorm.weight", ())
            tied = self.model.tie_word_embeddings
            yield (
                f"{TRTLLM_LM_HEAD}.weight",
                self._table("embedding.word_embeddings" if tied else "output_layer"),
            )

    def _float(self, key: str, region: tuple[slice, ...]) -> Tensor:
        return self.reader.read(key, region).to(self.dtype).contiguous()

    def _table(self, module: str) -> Tensor:
        rows, padding = vocab_rows(self.model, self.rank)
        table = self._float(f"{module}.weight", (rows,))
        return torch.nn.functional.pad(table, (0, 0, 0, padding))

    def _layer(self, prefix: str, layer: int) -> Iterator[tuple[str, Tensor]]:
        for linear, name in TRTLLM_NORMS.items():
            key = f"decoder.layers.{linear}.layer_norm_weight"
            norm = self._float(key, (slice(layer, layer + 1),))
            yield f"{prefix}{name}.weight", norm[0]
        model, rank = self.model, self.rank
        attention = even_part(model.num_attention_heads, rank)
        d = model.head_dim
        everything = slice(None)
        all_rows = [everything]
        row_parallel = {
            "self_attention.linear_proj": slice(attention.start * d, attention.stop * d),
            "mlp.linear_fc2": even_part(model.intermediate_size, rank),
        }
        rows = {
            "attention.qkv": qkv_rows(model, rank),
            "attention.dense": all_rows,
            "mlp.fc": gate_rows(model, rank),
            "mlp.gate": up_rows(model, rank),
            "mlp.proj": all_rows,
        }
        for linear, modules in TRTLLM_LINEARS.items():
            cols = row_parallel.get(linear, everything)
            for module in modules:
                tensors = self._linear(layer, linear, rows[module], cols)
                for suffix, tensor in tensors.items():
                    yield f"{prefix}{module}.{suffix}", tensor

    def _gather(self, key: str, lead: tuple[slice, ...], rows: Rows, *rest: slice) -> Tensor:
        """Row blocks of a checkpoint tensor, concatenated."""
        parts = [self.reader.read(key, (*lead, block, *rest)) for block in rows]
        return torch.cat(parts, dim=len(lead))

    def _linear(self, layer: int, linear: str, rows: Rows, cols: slice) -> dict[str, Tensor]:
        """Tensors of one linear on this rank, in the format of its scheme."""
        lead = (slice(layer, layer + 1),)
        weight = self._gather(f"decoder.layers.{linear}.weight", lead, rows, cols)[0]
        name = f"decoder.layers.{layer}.{linear}"
        scheme = self.reader.layers.get(name)
        if scheme is None:
            return {"weight": weight.to(self.dtype)}
        assert scheme.weight is not None
        scale = self._weight_scale(name, scheme.weight, rows, cols)
        codes = quantize(weight, scale, scheme.weight.format, scheme.weight.granularity)
        ones = torch.ones(weight.shape[1], dtype=self.dtype)
        if scheme.name == "int8":
            return {
                "weight": codes,
                "weights_scaling_factor": scale,
                "activation_scaling_factor": self.reader.read(f"quantizers.{name}.input_scale"),
                "prequant_scaling_factor": ones,
            }
        if scheme.name == "fp8":
            return {
                "weight": codes,
                "weights_scaling_factor": scale,
                "activation_scaling_factor": self.reader.read(f"quantizers.{name}.input_scale"),
            }
        if scheme.name == "int4":
            return {
                "weight": pack_int4(codes),
                "weights_scaling_factor": self._served_scale(name, scale),
                "prequant_scaling_factor": ones,
            }
        assert scheme.name == "int8_wo", scheme.name
        return {"weight": dequantize(codes, scale, scheme.weight.granularity, self.dtype)}

    def _served_scale(self, name: str, scale: Tensor) -> Tensor:
        """The scale in the model's dtype, in which TensorRT-LLM keeps it; must lose nothing."""
        served = scale.to(self.dtype)
        if not torch.equal(served.float(), scale):
            raise ValueError(
                f"{name}: weight scales do not fit export.dtype={self.dtype} exactly (smallest "
                f"{scale.min():.3g}); use bfloat16 or float32."
            )
        return served

    def _weight_scale(self, name: str, scheme: TensorScheme, rows: Rows, cols: slice) -> Tensor:
        """The frozen scale of this rank's part of a weight, never recomputed."""
        key = f"quantizers.{name}.weight_scale"
        granularity = scheme.granularity
        if isinstance(granularity, PerTensor):
            return self.reader.read(key)
        if isinstance(granularity, PerChannel):
            return self._gather(key, (), rows)
        size = granularity.size
        groups = cols
        if cols.start is not None:
            groups = slice(cols.start // size, cols.stop // size)
        return self._gather(key, (), rows, groups)

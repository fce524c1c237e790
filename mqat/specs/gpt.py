"""Spec in, spec out: Megatron layer specs whose linears and attention compute with quantized values.

Nothing that is already built is touched, and the given spec is not modified.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from mqat.models.decoder import CORE_ATTENTION, DecoderConfig
from mqat.models.schemes import Scheme
from mqat.parallel.attention import KvCacheAttention
from mqat.parallel.layout import shard_count
from mqat.parallel.linear import QuantColumnParallelLinear, QuantRowParallelLinear
from mqat.quant.scheme import LinearScheme

_REPLACEMENTS = {
    "self_attention.linear_qkv": QuantColumnParallelLinear,
    "self_attention.linear_proj": QuantRowParallelLinear,
    "mlp.linear_fc1": QuantColumnParallelLinear,
    "mlp.linear_fc2": QuantRowParallelLinear,
}


def quantize_layer_spec(
    spec: ModuleSpec,
    schemes: Mapping[str, Scheme],
    *,
    layer: int,
    num_shards: int,
    biases: Collection[str] | None = None,
) -> ModuleSpec:
    """A copy of a transformer-layer spec with its four linears replaced, its attention wrapped.

    Args:
        spec: Layer spec with self-attention and a dense gated MLP (such as
            `backend.gpt_layer_spec()`).
        schemes: Short name (`mlp.linear_fc1`, ..., `self_attention.core_attention` for the cache) ->
            scheme. A linear without one is unquantized but can still run layout-exact calibration; an
            attention without one is left as it is.
        layer: Global, zero-based layer number; it becomes part of the quantizers' names.
        num_shards: Largest valid tensor-parallel size (`parallel.layout.shard_count`).
        biases: Short names of the linears that have a bias; None: as Megatron's config says, which
            knows no biases on attention alone.
    """
    linears = {short: s for short, s in schemes.items() if isinstance(s, LinearScheme)}
    cache = schemes.get(CORE_ATTENTION)
    replaced: dict[str, ModuleSpec] = {}
    for short, module in _REPLACEMENTS.items():
        params: dict[str, Any] = {
            "name": f"decoder.layers.{layer}.{short}",
            "scheme": linears.get(short),
            "num_shards": num_shards,
            "has_bias": None if biases is None else short in biases,
        }
        if short == "mlp.linear_fc1":
            params["parts"] = 2
        replaced[short] = ModuleSpec(module=module, params=params)
    if cache is not None:
        params = {
            "attention": spec.submodules.self_attention.submodules.core_attention,
            "name": f"decoder.layers.{layer}.{CORE_ATTENTION}",
            "scheme": cache,
        }
        replaced[CORE_ATTENTION] = ModuleSpec(module=KvCacheAttention, params=params)

    def with_replaced(parent: ModuleSpec, prefix: str) -> ModuleSpec:
        inside = {n.removeprefix(prefix): s for n, s in replaced.items() if n.startswith(prefix)}
        return replace(parent, submodules=replace(parent.submodules, **inside))

    submodules = replace(
        spec.submodules,
        self_attention=with_replaced(spec.submodules.self_attention, "self_attention."),
        mlp=with_replaced(spec.submodules.mlp, "mlp."),
    )
    return replace(spec, submodules=submodules)


def quantize_block_spec(
    spec: ModuleSpec,
    layers: Mapping[str, Scheme],
    *,
    model: DecoderConfig,
    transformer_config: Any,
    pp_rank: int,
    vp_stage: int | None = None,
) -> TransformerBlockSubmodules:
    """Specs of the layers that one pipeline stage (and virtual chunk) builds.

    Args:
        spec: Layer spec used for every layer; the last norm is like its first.
        layers: Global name -> scheme, as from `Policy.resolve`.
        model: Global sizes.
        transformer_config: Megatron's config, which knows how layers are spread over stages.
        pp_rank: Pipeline rank.
        vp_stage: Virtual chunk under interleaved pipeline parallelism.
    """
    offset = get_transformer_layer_offset(transformer_config, vp_stage, pp_rank)
    count = get_num_layers_to_build(transformer_config, vp_stage, pp_rank)
    specs = []
    for layer in range(offset, offset + count):
        prefix = f"decoder.layers.{layer}."
        shorts = (*_REPLACEMENTS, CORE_ATTENTION)
        schemes = {s: layers[prefix + s] for s in shorts if prefix + s in layers}
        specs.append(
            quantize_layer_spec(
                spec, schemes, layer=layer, num_shards=shard_count(model), biases=model.biases
            )
        )
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=spec.submodules.input_layernorm)

"""Spec in, spec out: Megatron layer specs whose linears and attention compute with quantized values.

Nothing that is already built is touched, and the given spec is not modified.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from mqat.errors import UserError
from mqat.models.decoder import DecoderConfig
from mqat.models.experts import in_mixture
from mqat.models.schemes import Scheme
from mqat.models.structure import (
    CORE_ATTENTION,
    DENSE_LINEARS,
    DENSE_NORMS,
    KEY_NORM,
    OUTPUT_NORMS,
    QUERY_NORM,
    Linear,
    Norm,
    in_layer,
)
from mqat.parallel.activated_linear import ActivatedRowParallelLinear, fuses_activation
from mqat.parallel.attention import KvCacheAttention
from mqat.parallel.layout import shard_count
from mqat.parallel.linear import QuantColumnParallelLinear, QuantRowParallelLinear
from mqat.parallel.step_weights import gemm_kind
from mqat.quant.scheme import LinearScheme
from mqat.specs.backend import SdpaAttention, with_softcap
from mqat.specs.config_check import check_config
from mqat.specs.elementwise import ActivatedLater, OutputNorm, Swiglu
from mqat.specs.experts import check_mixture, with_experts
from mqat.specs.slots import class_name, spec_slot, with_slots
from mqat.specs.transformer_engine import FUSED_LINEAR, adapt_layer_spec
from mqat.specs.window import with_own_positions

# Of `cp_comm_type`: ranks see the keys of all tokens at once.
_WHOLE_KEYS = ("all_gather", "a2a")
_SELF_ATTENTION = "self_attention"
_REPLACEMENTS = {"column": QuantColumnParallelLinear, "row": QuantRowParallelLinear}


def _check_norms(spec: ModuleSpec, norms: Sequence[Norm]) -> None:
    """Refuses specs that have other norms than the model's.

    Raises:
        UserError: Names the slot without a norm, or with one too many.
    """
    for norm in (QUERY_NORM, KEY_NORM):
        if norm not in norms and spec_slot(spec, norm.name) not in (None, IdentityOp):
            raise UserError(
                f"layer spec: the slot {norm.name} holds a norm of query or key heads, which the model "
                "is not described with: choose a family that has them (qwen3), or a spec without."
            )
    for norm in OUTPUT_NORMS:
        found = class_name(spec_slot(spec, norm.name.partition(".")[0]))
        if (norm in norms) != (found == OutputNorm.__name__):
            raise UserError(
                f"layer spec: {norm.name.partition('.')[0]} is {found}, but "
                f"{'what is added has a norm' if norm in norms else 'nothing that is added has one'} in "
                "this family; use mqat.specs.backend.gpt_layer_spec() with the model's norms."
            )
    for norm in (norm for norm in norms if norm not in OUTPUT_NORMS):
        slot = spec_slot(spec, norm.name)
        module = slot.module if isinstance(slot, ModuleSpec) else slot
        if module is None or module is IdentityOp:
            found = "nothing" if module is None else module.__name__
            raise UserError(
                f"layer spec: the slot {norm.name} holds {found}, and no linear has the norm inside, as "
                f"Transformer Engine's {FUSED_LINEAR} does. Use a spec with it, such as "
                "mqat.specs.backend.gpt_layer_spec() or one of Megatron's."
            )


def _check_core_attention(spec: ModuleSpec, config: Any) -> None:
    """Refuses core attentions that cannot do what they should under context parallelism.

    Megatron's own knows nothing of it, and Transformer Engine's rings have no windows.
    """
    if config.context_parallel_size == 1:
        return
    core = spec_slot(spec, CORE_ATTENTION.name)
    core = core.module if isinstance(core, ModuleSpec) else core
    is_ours = isinstance(core, type) and issubclass(core, SdpaAttention)
    if config.window_size is not None and not is_ours and config.cp_comm_type not in _WHOLE_KEYS:
        raise UserError(
            f"layer spec: {CORE_ATTENTION.name} is {class_name(core)}, with windows and "
            f"context_parallel_size={config.context_parallel_size}: model.megatron.cp_comm_type="
            f"{config.cp_comm_type!r} must be one of {', '.join(_WHOLE_KEYS)}, or use torch's attention "
            "(model.transformer_engine=false)."
        )
    if core is DotProductAttention:
        raise UserError(
            f"layer spec: {CORE_ATTENTION.name} is Megatron's DotProductAttention, which cannot compute "
            f"with context_parallel_size={config.context_parallel_size}. Use mqat.specs.backend."
            "gpt_layer_spec(), Transformer Engine's attention, or context_parallel_size=1."
        )


def _fuses(spec: ModuleSpec, linear: Linear, scheme: Any) -> bool:
    """Whether the linear is to have the activation in front of it inside."""
    if linear.activation is None or not isinstance(scheme, LinearScheme):
        return False
    if gemm_kind(scheme) is None:
        return False
    return spec_slot(spec, linear.activation) is Swiglu and fuses_activation(scheme.input)


def _own_attention(spec: ModuleSpec, model: DecoderConfig, layer: int) -> ModuleSpec:
    """A copy with what attention of one layer does that Megatron's configuration cannot say.

    Raises:
        UserError: Scores are capped, and the spec's core attention cannot do that.
    """
    cap = model.attention_softcap
    if cap is not None:
        core = spec_slot(spec, CORE_ATTENTION.name)
        core = core.module if isinstance(core, ModuleSpec) else core
        if not (isinstance(core, type) and issubclass(core, SdpaAttention)):
            raise UserError(
                f"layer spec: {CORE_ATTENTION.name} is {class_name(core)}, which does not cap scores at "
                f"{cap:g}, as this model's are; use mqat.specs.backend.SdpaAttention "
                "(model.transformer_engine=false)."
            )
        spec = with_slots(spec, {CORE_ATTENTION.name: with_softcap(core, cap)})
    if model.windowed_rope_theta is not None:
        own = spec_slot(spec, _SELF_ATTENTION)
        module = with_own_positions(own.module, layer in model.windowed_layers)
        spec = with_slots(spec, {_SELF_ATTENTION: replace(own, module=module)})
    return spec


def quantize_layer_spec(
    spec: ModuleSpec,
    schemes: Mapping[str, Scheme],
    *,
    layer: int,
    num_shards: int,
    biases: Collection[str] | None = None,
    linears: Sequence[Linear] = DENSE_LINEARS,
    norms: Sequence[Norm] = DENSE_NORMS,
    is_packed: bool = False,
) -> ModuleSpec:
    """A copy of a transformer-layer spec with its linears replaced, its attention wrapped.

    Args:
        spec: Layer spec with self-attention and a gated MLP: `backend.gpt_layer_spec()`, or Megatron's
            own, with or without Transformer Engine. Where `linears` has experts, a mixture of them.
        schemes: Name in the layer (of a linear, or of the core attention for the cache) -> scheme. A
            linear without one is unquantized but can still run layout-exact calibration; an attention
            without one is left as it is.
        layer: Global, zero-based layer number; it becomes part of the quantizers' names.
        num_shards: Largest valid tensor-parallel size (`parallel.layout.shard_count`).
        biases: Names of the linears that have a bias; None: as Megatron's config says, which
            knows no biases on attention alone.
        linears: Those of a layer.
        norms: Those of a layer.
        is_packed: Weights that are quantized come packed, as a frozen backbone.

    Raises:
        UserError: The spec lacks a norm, or has one that is not among `norms`, or has other linears than
            Megatron's own or Transformer Engine's (`transformer_engine.adapt_layer_spec`).
    """
    experts = [linear for linear in linears if in_mixture(linear)]
    if experts:
        check_mixture(spec, has_shared=any(linear.expert is None for linear in experts))
    dense = [linear for linear in linears if not in_mixture(linear)]
    spec = adapt_layer_spec(spec, dense, has_experts=bool(experts))
    _check_norms(spec, norms)

    def replacement(linear: Linear) -> ModuleSpec:
        scheme = schemes.get(linear.name)
        params: dict[str, Any] = {
            "quantized_name": in_layer(layer, linear.name),
            "scheme": scheme if isinstance(scheme, LinearScheme) else None,
            "num_shards": num_shards,
            "has_bias": None if biases is None else linear.name in biases,
        }
        if is_packed and params["scheme"] is not None and params["scheme"].weight is not None:
            params["is_packed"] = True
        if linear.separate_parts > 1:
            params["parts"] = linear.separate_parts
        module: type = _REPLACEMENTS[linear.parallel]
        if _fuses(spec, linear, params["scheme"]):
            module, params["activation"] = ActivatedRowParallelLinear, Swiglu
        return ModuleSpec(module=module, params=params)

    slots: dict[str, Any] = {linear.name: replacement(linear) for linear in dense}
    slots |= {
        str(linear.activation): ActivatedLater
        for linear in dense
        if _fuses(spec, linear, schemes.get(linear.name))
    }
    cache = schemes.get(CORE_ATTENTION.name)
    if cache is not None:
        params = {
            "attention": spec_slot(spec, CORE_ATTENTION.name),
            "quantized_name": in_layer(layer, CORE_ATTENTION.name),
            "scheme": cache,
        }
        slots[CORE_ATTENTION.name] = ModuleSpec(module=KvCacheAttention, params=params)
    spec = with_slots(spec, slots)
    if not experts:
        return spec
    return with_experts(spec, {linear.name: replacement(linear) for linear in experts})


def quantize_block_spec(
    spec: ModuleSpec,
    layers: Mapping[str, Scheme],
    *,
    model: DecoderConfig,
    transformer_config: Any,
    pp_rank: int,
    vp_stage: int | None = None,
    dense_spec: ModuleSpec | None = None,
    is_packed: bool = False,
) -> TransformerBlockSubmodules:
    """Specs of the layers that one pipeline stage (and virtual chunk) builds.

    Args:
        spec: Layer spec used for every layer; the last norm is like its first.
        layers: Global name -> scheme, as from `Policy.resolve`.
        model: Global sizes.
        transformer_config: Megatron's config, which knows how layers are spread over stages.
        pp_rank: Pipeline rank.
        vp_stage: Virtual chunk under interleaved pipeline parallelism.
        dense_spec: Of a mixture's layers without experts, where it has some.
        is_packed: As for `quantize_layer_spec`.

    Raises:
        UserError: As `quantize_layer_spec` and `config_check.check_config`; or the model has layers
            without experts, and there is no spec for them.
    """
    if model.dense_layers and dense_spec is None:
        raise UserError(
            f"layer spec: layers {[*model.dense_layers]} have no experts; give a spec for them, too "
            "(dense_spec, such as gpt_layer_spec() without num_experts)."
        )
    check_config(transformer_config, model)
    dense = dense_spec or spec
    for given in (spec, dense):
        _check_core_attention(given, transformer_config)
    offset = get_transformer_layer_offset(transformer_config, vp_stage, pp_rank)
    count = get_num_layers_to_build(transformer_config, vp_stage, pp_rank)
    names = [*(linear.name for linear in model.linears), CORE_ATTENTION.name]
    specs = []
    for layer in range(offset, offset + count):
        schemes = {n: layers[in_layer(layer, n)] for n in names if in_layer(layer, n) in layers}
        own = _own_attention(dense if layer in model.dense_layers else spec, model, layer)
        specs.append(
            quantize_layer_spec(
                own, schemes, layer=layer, num_shards=shard_count(model), biases=model.biases,
                linears=model.linears_of(layer), norms=model.norms_of(layer), is_packed=is_packed,
            )
        )  # fmt: skip
    outside = model.architecture.linears  # of experts
    adapted = adapt_layer_spec(spec, outside, has_experts=model.num_experts > 0)
    last_norm = spec_slot(adapted, model.norms[0].name)
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=last_norm)

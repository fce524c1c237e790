"""What a built Megatron model computes, as a description; where it differs from a given one is refused.

As `specs.config_check`, of which this takes the configuration's part. Norms, activation and rotary
frequencies are compared by what they compute, and every tensor of the state dict has a place.

Sources: Megatron-Core 0.16 `models/gpt/gpt_model.py`, `transformer/{attention,mlp}.py`.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp

from mqat.errors import UserError
from mqat.models.decoder import FAMILIES, DecoderConfig
from mqat.models.experts import SHARED_EXPERTS
from mqat.models.family import Family
from mqat.models.structure import (
    CORE_ATTENTION,
    DENSE_LINEARS,
    EXPERTS,
    FC2,
    KEY_NORM,
    OUTPUT_NORMS,
    QUERY_NORM,
    Norm,
    is_in_layer,
    is_table_key,
    split_name,
)
from mqat.parallel.layout import shard_count
from mqat.parallel.linear import quantized_linears
from mqat.parallel.quantized_module import unwrapped
from mqat.specs.activations import FUNCTIONS, activation_of, find_activation
from mqat.specs.config_check import (
    SIZES,
    SIZES_OF_EXPERTS,
    built_dense_layers,
    config_differences,
    is_softmax_scale,
    mixture_of,
    mixture_of_family,
    position_word,
    refuse,
    scale_text,
)
from mqat.specs.rope import MEGATRON_LLAMA3, DecoderRotary, frequencies
from mqat.specs.window import built_windows

_HEAD_NORMS = (QUERY_NORM, KEY_NORM)


def describe_model(model: Any) -> DecoderConfig:
    """The description of a Megatron GPTModel, so that nobody writes it a second time.

    Args:
        model: GPTModel in any wrapper, or this rank's chunks; built at any layout. Without
            `true_vocab_size` its vocabulary is the whole table: where that is padded, replace it. Its
            family is the first of those that compute the same (Llama for Mistral).

    Raises:
        UserError: It computes something that no description says; names the field, argument or tensor.
    """
    (chunk, *_) = unwrapped(model)
    config, layers = chunk.config, list(chunk.decoder.layers)
    has_norms = any(_at(layer, norm.name) is not None for layer in layers for norm in _HEAD_NORMS)
    sizes = {
        "vocab_size": int(getattr(chunk, "true_vocab_size", chunk.vocab_size)),
        "max_position_embeddings": int(chunk.max_sequence_length),
        "tie_word_embeddings": bool(chunk.share_embeddings_and_output_weights),
    } | {name: getattr(config, field) for name, field in SIZES.items()}
    sizes |= _built_positions(chunk)
    has_experts = config.num_moe_experts is not None
    if has_experts:
        sizes |= _built_experts(config)
    names = [linear.name for linear in DENSE_LINEARS]
    biases = tuple(n for n in names if any(_at(layer, f"{n}.bias") is not None for layer in layers))
    families = [
        family
        for family in FAMILIES.values()
        if has_experts == (family.mixture is not None)
        and (has_norms == (QUERY_NORM in family.norms) or family.head_norms_switch)
        and family.may_have(biases)
    ]
    if not families:
        raise UserError(
            f"model: no family has {'experts, ' if has_experts else ''}biases on {list(biases)} and "
            f"{'' if has_norms else 'no '}norms of query and key heads; known are {', '.join(FAMILIES)}."
        )
    # Where none computes the same, the first one's differences are told.
    fitting = [family for family in families if _computes(chunk, family)] or families[:1]
    unsaid: UserError | None = None
    for family in fitting:
        try:
            of_heads = family.head_norms_switch is None or has_norms
            described = DecoderConfig(
                **sizes, family=family.name, biases=biases, normalizes_heads=of_heads
            )
        except UserError as error:
            unsaid = unsaid or error  # another family may have keys for it
            continue
        check_description(model, described)
        return described
    assert unsaid is not None, "there is a family"
    raise unsaid


def _computes(chunk: Any, family: Family) -> bool:
    """Whether a GPTModel has the family's norms, activation and positions."""
    config, layers = chunk.config, list(chunk.decoder.layers)
    output_norms = any(
        _at(layer, norm.name) is not None for layer in layers for norm in OUTPUT_NORMS
    )
    found = (
        config.normalization, config.layernorm_zero_centered_gamma, config.gated_linear_unit,
        find_activation(config), chunk.position_embedding_type,
        getattr(chunk, "embedding_scale", 1.0) != 1, output_norms, config.rotary_interleaved,
    )  # fmt: skip
    return mixture_of(config) == mixture_of_family(family) and found == (
        family.normalization, family.zero_centered_gamma, family.is_gated, family.activation,
        position_word(family), family.scales_embedding, bool({*family.norms} & {*OUTPUT_NORMS}),
        family.is_rotary_interleaved,
    )  # fmt: skip


def _built_experts(config: Any) -> dict[str, Any]:
    """Fields of a description, of a mixture."""
    limits = config.moe_router_group_topk not in (None, config.moe_router_num_groups)
    groups = config.moe_router_num_groups if limits else None
    return {name: getattr(config, field) for name, field in SIZES_OF_EXPERTS.items()} | {
        "normalizes_expert_weights": not config.moe_router_pre_softmax,
        "shared_intermediate_size": config.moe_shared_expert_intermediate_size or 0,
        "dense_layers": built_dense_layers(config),
        "expert_groups": groups or 1,
        "expert_groups_per_token": config.moe_router_group_topk if limits else 1,
        "expert_weight_scale": config.moe_router_topk_scaling_factor or 1.0,
    }


def check_description(model: Any, described: DecoderConfig) -> None:
    """Refuses a model that computes something else than its description says.

    Args:
        model: As for `describe_model`.
        described: What is stored with its weights.

    Raises:
        UserError: Names the field, argument, module or tensor with both values.
    """
    for chunk in unwrapped(model):
        refuse(
            [*config_differences(chunk.config, described), *_chunk_differences(chunk, described)]
        )


def _chunk_differences(chunk: Any, described: DecoderConfig) -> Iterator[str]:
    """Arguments, modules and tensors of one GPTModel."""
    kind, wanted = (
        getattr(chunk, "position_embedding_type", None),
        position_word(described.architecture),
    )
    if kind != wanted:
        yield f"position_embedding_type={kind!r}, must be {wanted!r}"
    elif kind == "rope":
        yield from _rotary_differences(chunk, described)
    if (cap := getattr(chunk, "logit_softcap", None)) != described.logit_softcap:
        yield f"logit_softcap={cap}, but it is described with {described.logit_softcap}"
    scale, of_family = getattr(chunk, "embedding_scale", 1.0), described.embedding_scale
    if abs(scale - of_family) > 0.01 * of_family:  # rounded to a dtype
        yield f"embedding_scale={scale}, must be {of_family}"
    vocab, tied = described.vocab_size, described.tie_word_embeddings
    padding = shard_count(described) + 128 * chunk.config.tensor_model_parallel_size
    true = getattr(chunk, "true_vocab_size", None)
    if not vocab <= chunk.vocab_size < vocab + padding or true not in (None, vocab):
        yield f"vocab_size={true or chunk.vocab_size}, but it is described with {vocab}"
    if bool(chunk.share_embeddings_and_output_weights) != tied:
        yield f"share_embeddings_and_output_weights={not tied}, but it is described with {tied}"
    if getattr(chunk, "mtp_process", False):
        yield "mtp_block_spec: multi-token prediction has no place in a description"
    for layer in chunk.decoder.layers:
        yield from _layer_differences(layer, described)
    last = described.architecture.final_norm
    if getattr(chunk.decoder, "final_layernorm", None) is not None:
        yield from _norm_differences(chunk, last, described)
    elif chunk.post_process:
        yield f"{last.name} is missing"
    yield from _state_differences(chunk, described)


def _built_positions(chunk: Any) -> dict[str, Any]:
    """Fields of a description: what our rotary embedding was built from, or Megatron's arguments."""
    rotary = getattr(chunk, "rotary_pos_emb", None)
    window, layers = built_windows(chunk.config)
    scale, usual = chunk.config.softmax_scale, chunk.config.kv_channels**-0.5
    found: dict[str, Any] = {
        "sliding_window": window,
        "windowed_layers": layers,
        "attention_scale": None if scale is None or math.isclose(scale, usual) else scale,
        "attention_softcap": getattr(_core(chunk.decoder.layers[0]), "softcap", None)
        if len(chunk.decoder.layers)
        else None,
        "logit_softcap": getattr(chunk, "logit_softcap", None),
    }
    if isinstance(rotary, DecoderRotary):
        names = ("rope_theta", "rope_scaling", "rotary_fraction", "windowed_rope_theta")
        return found | {name: getattr(rotary.model, name) for name in names}
    base = float(getattr(chunk, "rotary_base", 10000.0))
    fraction = float(getattr(chunk, "rotary_percent", 1.0))
    scaling = _rope_scaling(chunk, rotary, base) if rotary is not None else None
    return found | {"rope_theta": base, "rope_scaling": scaling, "rotary_fraction": fraction}


def _rope_scaling(chunk: Any, rotary: Any, base: float) -> dict[str, Any] | None:
    """Of Megatron's own rotary embedding: linear, or Llama 3's with the numbers it has built in.

    It keeps the factor of the latter only in the frequencies: that of the slowest pair.
    """
    if (factor := getattr(rotary, "seq_len_interpolation_factor", None)) is not None:
        return {"rope_type": "linear", "factor": float(factor)}
    if not getattr(chunk, "rotary_scaling", False):
        return None
    plain = base ** -(1 - 1 / len(rotary.inv_freq))
    turns = MEGATRON_LLAMA3["original_max_position_embeddings"] * plain / (2 * math.pi)
    low, high = MEGATRON_LLAMA3["low_freq_factor"], MEGATRON_LLAMA3["high_freq_factor"]
    kept = min(max((turns - low) / (high - low), 0.0), 1.0)
    factor = 8.0 if kept == 1 else (1 - kept) / (float(rotary.inv_freq[-1]) / plain - kept)
    return {"rope_type": "llama3", "factor": round(factor, 4)} | MEGATRON_LLAMA3


def _rotary_differences(chunk: Any, described: DecoderConfig) -> Iterator[str]:
    rotary, wanted = chunk.rotary_pos_emb, frequencies(described).double()
    found = rotary.inv_freq.cpu().double()
    if (factor := rotary.seq_len_interpolation_factor) is not None:
        found = found / factor
    if found.shape != wanted.shape:
        yield (
            f"rotary_percent: {2 * len(found)} of {described.head_dim} channels are rotated, not "
            f"{described.rotary_channels}"
        )
    elif not torch.allclose(found, wanted, rtol=1e-4):
        at = int((found / wanted).log().abs().argmax())
        yield (
            f"rotary_base or rope_scaling: channel pair {at} turns by {found[at]:.4g} a token, but by "
            f"{wanted[at]:.4g} with rope_theta={described.rope_theta} and rope_scaling="
            f"{described.rope_scaling}"
        )
    # What a sequence's length decides, and windowed layers have of their own, is in ours alone.
    names = ("rope_scaling", "windowed_rope_theta", "max_position_embeddings")
    built = rotary.model if isinstance(rotary, DecoderRotary) else None
    for name in names if built is not None else ():
        if getattr(built, name) != getattr(described, name):
            yield (
                f"{name}={getattr(built, name)!r}, but it is described with "
                f"{getattr(described, name)!r}"
            )
    kind = (described.rope_scaling or {}).get("rope_type")
    if built is None and (
        kind in ("dynamic", "longrope") or described.windowed_rope_theta is not None
    ):
        yield f"rotary_pos_emb is Megatron's own, which has no {kind or 'second base'}"


def _core(layer: Any) -> Any:
    """Core attention, without the quantized cache around it."""
    core = _at(layer, CORE_ATTENTION.name)
    return getattr(core, "attention", core)


def _at(owner: Any, name: str) -> Any:
    """What a dotted name stands for; None: nothing."""
    for part in name.split("."):
        owner = getattr(owner, part, None)
    return None if isinstance(owner, IdentityOp) else owner


def _layer_differences(layer: Any, described: DecoderConfig) -> Iterator[str]:
    where = f"layer {layer.layer_number - 1}"
    norms = described.norms_of(layer.layer_number - 1)
    for norm in dict.fromkeys((*norms, *_HEAD_NORMS, *OUTPUT_NORMS)):
        if norm not in norms and _at(layer, norm.name) is not None:
            kind = "q/k norm" if norm in _HEAD_NORMS else "norm of what is added"
            yield f"{where}: {norm.name} ({kind}), which a {described.family} does not have"
        elif norm in norms:
            yield from (f"{where}: {text}" for text in _norm_differences(layer, norm, described))
    attention = layer.self_attention
    if attention.attn_mask_type not in (AttnMaskType.causal, AttnMaskType.padding_causal):
        yield f"{where}: attn_mask_type={attention.attn_mask_type}, must be causal"
    core = _core(layer)
    scale = getattr(core, "softmax_scale", layer.config.softmax_scale)
    if not is_softmax_scale(scale, described) and not layer.config.apply_query_key_layer_scaling:
        yield f"{where}: softmax_scale={scale}, must be {scale_text(described)}"
    if (cap := getattr(core, "softcap", None)) != described.attention_softcap:
        yield f"{where}: softcap={cap}, but it is described with {described.attention_softcap}"
    mlps = {"mlp": layer.mlp}
    if (experts := _at(layer, EXPERTS)) is not None:
        local = getattr(experts, "local_experts", None)
        if local is None:
            kind = type(experts).__name__
            yield f"{where}: {EXPERTS} is {kind}; build the model with moe_grouped_gemm=False"
            return
        mlps = {EXPERTS: local[0]}
        if layer.mlp.shared_experts is not None:
            mlps[SHARED_EXPERTS] = layer.mlp.shared_experts
    for name, mlp in mlps.items():
        for text in _activation_differences(layer, mlp, described):
            yield f"{where}: {name}.{text}"


def _activation_differences(layer: Any, mlp: Any, described: DecoderConfig) -> Iterator[str]:
    wanted, activation = described.architecture.activation, getattr(mlp, "activation_func", None)
    activation = _at(mlp, f"{FC2.kind}.activation") or activation  # inside of a linear
    if layer.config.use_te_activation_func and activation is not None:
        device = next(layer.parameters()).device
        x = torch.linspace(-3, 3, 32, device=device, dtype=layer.config.params_dtype)
        gate, up = x.float().chunk(2)
        if not torch.allclose(
            activation(x).float(), FUNCTIONS[wanted](gate) * up, rtol=0.05, atol=0.05
        ):
            yield f"activation_func does not compute {wanted} with a gate"
    elif activation_of(activation, layer.config) != wanted:
        name = getattr(activation, "__name__", activation)
        yield f"activation_func={name}, must be {wanted}"


@torch.no_grad()
def _norm_differences(owner: Any, norm: Norm, described: DecoderConfig) -> Iterator[str]:
    """A norm that computes something else than its family's, with its weight and bias."""
    module = _at(owner, norm.name)
    if module is None:
        return  # inside a linear of Transformer Engine, where the configuration says what it is
    family, weight, eps = described.architecture, module.weight, described.rms_norm_eps
    generator = torch.Generator().manual_seed(0)
    # Of eps's own size and off centre, so that another eps or LayerNorm's mean shows.
    x = (torch.randn(1, 1, len(weight), generator=generator) + 0.5) * math.sqrt(eps)
    x = x.to(weight)
    found, bias = x.float(), getattr(module, "bias", None)
    if family.normalization == "LayerNorm":
        found = found - found.mean()
    wanted = found * (found.pow(2).mean() + eps).rsqrt()
    wanted = wanted * (weight.float() + family.zero_centered_gamma)
    wanted = wanted if bias is None else wanted + bias.float()
    error = (module(x).float() - wanted).norm() / wanted.norm().clamp_min(1e-30)
    if error > 0.02:  # rounding of bfloat16 is 0.004
        kind = "zero-centred " * family.zero_centered_gamma + family.normalization
        yield (
            f"{norm.name} ({type(module).__name__}) does not compute {kind} with eps={eps} and its "
            f"weight (off by {float(error):.1%})"
        )


def _state_differences(chunk: Any, described: DecoderConfig) -> Iterator[str]:
    """Tensors of the checkpoint that have no place, are missing, or of another shape."""
    places, found = described.checkpoint_shapes(), set[str]()
    for key, shape in stored_shapes(chunk.sharded_state_dict()).items():
        place = places.get(key)
        is_padded = is_table_key(key) and place is not None and shape[1:] == place[1:]
        if place is None:
            yield f"tensor {key} {shape} has no place in the description"
        elif shape != place and not (is_padded and shape[0] >= place[0]):
            yield f"tensor {key} is {shape}, described as {place}"
        found.add(key)
    found |= {
        described.place(described.linear(short).key, layer)[0]
        for name, linear in quantized_linears(chunk).items()
        if linear.is_packed
        for layer, short in [split_name(name)]
    }
    own = [layer.layer_number - 1 for layer in chunk.decoder.layers]
    if described.dense_layers:  # each layer has keys of its own
        expected = {key for key in places if is_in_layer(key) and split_name(key)[0] in own}
    else:
        expected = {key for key in places if is_in_layer(key) and own}
    family, last = described.architecture, described.architecture.final_norm
    if chunk.pre_process:
        expected |= {table.key for table in family.tables if table != family.output_layer}
    if chunk.post_process:
        expected |= {last.key, last.bias_key, family.output_layer.key} & places.keys()
    yield from (f"tensor {key} is missing" for key in sorted(expected - found))


def stored_shapes(state: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Checkpoint key -> global shape of every tensor in a sharded state dict."""
    shapes: dict[str, tuple[int, ...]] = {}
    for entry in state.values():
        if isinstance(entry, ShardedTensorFactory):
            entry = entry.build()
        if isinstance(entry, ShardedTensor):
            shapes[entry.key] = tuple(entry.global_shape)
        elif isinstance(entry, Mapping):
            shapes |= stored_shapes(entry)
        elif isinstance(entry, list | tuple):
            shapes |= stored_shapes({str(number): item for number, item in enumerate(entry)})
    return shapes

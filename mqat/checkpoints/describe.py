"""What a built Megatron model computes, as a description; where it differs from a given one is refused.

As `specs.config_check`, of which this takes the configuration's part. Norms, activation and rotary
frequencies are compared by what they compute, and every tensor of the state dict has a place.

Sources: Megatron-Core 0.16 `models/gpt/gpt_model.py`, `transformer/{attention,mlp}.py`.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from torch import Tensor

from mqat.errors import UserError
from mqat.models.decoder import FAMILIES, DecoderConfig
from mqat.models.structure import (
    CORE_ATTENTION,
    EMBEDDING,
    FINAL_NORM,
    KEY_NORM,
    OUTPUT_LAYER,
    QUERY_NORM,
    Norm,
    is_in_layer,
    is_table_key,
)
from mqat.parallel.layout import shard_count
from mqat.parallel.quantized_module import unwrapped
from mqat.specs.config_check import (
    MEGATRON_ROPE,
    SIZES,
    SIZES_OF_EXPERTS,
    config_differences,
    is_silu,
    is_softmax_scale,
    refuse,
)

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
    base = float(getattr(chunk, "rotary_base", 10000.0))
    sizes = {
        "vocab_size": int(getattr(chunk, "true_vocab_size", chunk.vocab_size)),
        "rope_theta": base,
        "rope_scaling": _rope_scaling(chunk, base),
        "max_position_embeddings": int(chunk.max_sequence_length),
        "tie_word_embeddings": bool(chunk.share_embeddings_and_output_weights),
    } | {name: getattr(config, field) for name, field in SIZES.items()}
    has_experts = config.num_moe_experts is not None
    if has_experts:
        sizes |= {name: getattr(config, field) for name, field in SIZES_OF_EXPERTS.items()}
        sizes["normalizes_expert_weights"] = not config.moe_router_pre_softmax
    for family in FAMILIES.values():
        if has_experts != (family.mixture is not None):
            continue
        names = [linear.name for linear in family.linears]
        biases = tuple(
            n for n in names if any(_at(layer, f"{n}.bias") is not None for layer in layers)
        )
        if has_norms != (QUERY_NORM in family.norms) or not family.may_have(biases):
            continue
        described = DecoderConfig(**sizes, family=family.name, biases=biases)
        check_description(model, described)
        return described
    raise UserError(
        f"model: no family has {'experts, ' if has_experts else ''}biases on {list(biases)} and "
        f"{'' if has_norms else 'no '}norms of query and key heads; known are {', '.join(FAMILIES)}."
    )


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
    kind = getattr(chunk, "position_embedding_type", None)
    if kind != "rope":
        yield f"position_embedding_type={kind!r}, must be 'rope'"
    else:
        yield from _rotary_differences(chunk.rotary_pos_emb, described)
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
    if getattr(chunk.decoder, "final_layernorm", None) is not None:
        yield from _norm_differences(chunk, FINAL_NORM, described)
    elif chunk.post_process:
        yield f"{FINAL_NORM.name} is missing"
    yield from _state_differences(chunk, described)


def _frequencies(described: DecoderConfig) -> Tensor:
    """Of each pair of channels, in radians a token."""
    size = described.head_dim
    found = described.rope_theta ** -(torch.arange(0, size, 2).double() / size)
    scaling = described.rope_scaling
    if scaling is None:
        return found
    numbers = MEGATRON_ROPE | scaling
    low, high = numbers["low_freq_factor"], numbers["high_freq_factor"]
    turns = numbers["original_max_position_embeddings"] * found / (2 * math.pi)
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - smooth) * found / scaling["factor"] + smooth * found


def _rope_scaling(chunk: Any, base: float) -> dict[str, Any] | None:
    """Llama 3's, whose factor Megatron keeps only in the frequencies: that of the slowest pair."""
    if not getattr(chunk, "rotary_scaling", False):
        return None
    slowest = float(chunk.rotary_pos_emb.inv_freq[-1])
    plain = base ** -(1 - 2 / chunk.config.kv_channels)
    turns = MEGATRON_ROPE["original_max_position_embeddings"] * plain / (2 * math.pi)
    low, high = MEGATRON_ROPE["low_freq_factor"], MEGATRON_ROPE["high_freq_factor"]
    smooth = min(max((turns - low) / (high - low), 0.0), 1.0)
    factor = 8.0 if smooth == 1 else (1 - smooth) / (slowest / plain - smooth)
    return {"rope_type": "llama3", "factor": round(factor, 4)} | MEGATRON_ROPE


def _rotary_differences(rotary: Any, described: DecoderConfig) -> Iterator[str]:
    found, wanted = rotary.inv_freq.cpu().double(), _frequencies(described)
    if found.shape != wanted.shape:
        yield f"rotary_percent: {2 * len(found)} of {described.head_dim} channels are rotated, not all"
    elif not torch.allclose(found, wanted, rtol=1e-4):
        at = int((found / wanted).log().abs().argmax())
        yield (
            f"rotary_base or rope_scaling: channel pair {at} turns by {found[at]:.4g} a token, but by "
            f"{wanted[at]:.4g} with rope_theta={described.rope_theta} and rope_scaling="
            f"{described.rope_scaling}"
        )
    if rotary.seq_len_interpolation_factor is not None:
        factor = rotary.seq_len_interpolation_factor
        yield f"seq_len_interpolation_factor={factor}, must be None"
    if rotary.rotary_interleaved:
        yield "rotary_interleaved=True, must be False"


def _at(owner: Any, name: str) -> Any:
    """What a dotted name stands for; None: nothing."""
    for part in name.split("."):
        owner = getattr(owner, part, None)
    return None if isinstance(owner, IdentityOp) else owner


def _layer_differences(layer: Any, described: DecoderConfig) -> Iterator[str]:
    where = f"layer {layer.layer_number - 1}"
    for norm in dict.fromkeys((*described.norms, *_HEAD_NORMS)):
        if norm not in described.norms and _at(layer, norm.name) is not None:
            yield f"{where}: {norm.name} (q/k norm), which a {described.family} does not have"
        elif norm in described.norms:
            yield from (f"{where}: {text}" for text in _norm_differences(layer, norm, described))
    attention, mlp = layer.self_attention, layer.mlp
    if described.num_experts:
        mlp = layer.mlp.experts.local_experts[0]
    activation = getattr(mlp, "activation_func", None)
    if attention.attn_mask_type not in (AttnMaskType.causal, AttnMaskType.padding_causal):
        yield f"{where}: attn_mask_type={attention.attn_mask_type}, must be causal"
    core = _at(layer, CORE_ATTENTION.name)
    scale = getattr(getattr(core, "attention", core), "softmax_scale", None)
    if not is_softmax_scale(scale, described) and not layer.config.apply_query_key_layer_scaling:
        yield f"{where}: softmax_scale={scale}, must be 1/sqrt({described.head_dim})"
    if layer.config.use_te_activation_func and activation is not None:
        device = next(layer.parameters()).device
        x = torch.linspace(-3, 3, 32, device=device, dtype=layer.config.params_dtype)
        gate, up = x.float().chunk(2)
        if not torch.allclose(activation(x).float(), F.silu(gate) * up, rtol=0.05, atol=0.05):
            yield f"{where}: mlp.activation_func does not compute SwiGLU"
    elif not is_silu(activation):
        yield f"{where}: mlp.activation_func={getattr(activation, '__name__', activation)}, must be silu"


@torch.no_grad()
def _norm_differences(owner: Any, norm: Norm, described: DecoderConfig) -> Iterator[str]:
    """A norm that computes something else than x / sqrt(mean(x^2) + eps) * weight."""
    module = _at(owner, norm.name)
    if module is None:
        return  # inside a linear of Transformer Engine, where the configuration says what it is
    weight, eps = module.weight, described.rms_norm_eps
    generator = torch.Generator().manual_seed(0)
    # Of eps's own size and off centre, so that another eps or LayerNorm's mean shows.
    x = (torch.randn(1, 1, len(weight), generator=generator) + 0.5) * math.sqrt(eps)
    x = x.to(weight)
    wanted = x.float() * (x.float().pow(2).mean() + eps).rsqrt() * weight.float()
    error = (module(x).float() - wanted).norm() / wanted.norm().clamp_min(1e-30)
    if error > 0.02:  # rounding of bfloat16 is 0.004
        yield (
            f"{norm.name} ({type(module).__name__}) does not compute RMSNorm with eps={eps} and its "
            f"weight (off by {float(error):.1%})"
        )


def _state_differences(chunk: Any, described: DecoderConfig) -> Iterator[str]:
    """Tensors of the checkpoint that have no place, are missing, or of another shape."""
    places, found = described.checkpoint_shapes(), set()
    for key, shape in stored_shapes(chunk.sharded_state_dict()).items():
        place = places.get(key)
        is_padded = is_table_key(key) and place is not None and shape[1:] == place[1:]
        if place is None:
            yield f"tensor {key} {shape} has no place in the description"
        elif shape != place and not (is_padded and shape[0] >= place[0]):
            yield f"tensor {key} is {shape}, described as {place}"
        found.add(key)
    expected = {key for key in places if is_in_layer(key) and len(chunk.decoder.layers)}
    expected |= {EMBEDDING.key} if chunk.pre_process else set()
    if chunk.post_process:
        expected |= {FINAL_NORM.key} | ({OUTPUT_LAYER.key} & places.keys())
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

"""What a Hugging Face directory of a described model holds: keys of `config.json`, names of tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mqat.models.family import HF_ATTENTION

if TYPE_CHECKING:
    from mqat.models.decoder import DecoderConfig


def experts_to_hf(model: DecoderConfig) -> dict[str, Any]:
    """Keys of experts and of what is optional around them; empty for dense models."""
    family, mixture = model.architecture, model.architecture.mixture
    if mixture is None:
        return {}
    keys: dict[str | None, Any] = {
        mixture.count: model.num_experts,
        "num_experts_per_tok": model.experts_per_token,
        mixture.size: model.expert_intermediate_size,
        "router_aux_loss_coef": model.router_aux_loss_coef,
        mixture.normalizes: model.normalizes_expert_weights,
        mixture.scaling: model.expert_weight_scale,
        mixture.shared_size: model.shared_intermediate_size,
        mixture.shared_count: model.shared_intermediate_size // model.expert_intermediate_size,
        family.head_norms_switch: model.normalizes_heads,
        family.hf_further_layers: 0,
    }
    found = {key: value for key, value in keys.items() if key is not None}
    if mixture.groups is not None:
        sizes = model.expert_groups, model.expert_groups_per_token
        found |= dict(zip(mixture.groups, sizes, strict=True))
    return found | (mixture.dense.to_hf(model.dense_layers) if mixture.dense else {})


def positions_to_hf(model: DecoderConfig) -> dict[str, Any]:
    """Keys of positions and attention."""
    family, window = model.architecture, model.architecture.window
    scaling = model.rope_scaling
    keys: dict[str, Any] = {"rope_theta": model.rope_theta, "rope_scaling": scaling}
    if scaling is not None and scaling["rope_type"] == "longrope":
        name = "original_max_position_embeddings"  # transformers 4 reads it here
        keys[name] = scaling[name]
        if family.rope_scalings is not None:  # of whose class it wants these three keys alone
            others = {key: v for key, v in scaling.items() if key not in ("rope_type", name)}
            keys["rope_scaling"] = {"type": "longrope", **others}
    if family.rotary_fraction is not None:
        keys["partial_rotary_factor"] = model.rotary_fraction
    if window is not None:
        # transformers makes masks of both kinds where there is a pattern.
        least = None if window.every is None else window.default
        keys["sliding_window"] = model.sliding_window or least
        if window.switch is not None:
            keys[window.switch] = model.sliding_window is not None
        has_pattern = window.every is not None or model.sliding_window is not None
        if has_pattern and not window.is_of_all_layers:
            keys["layer_types"] = [
                ("sliding" if layer in model.windowed_layers else "full") + "_attention"
                for layer in range(model.num_layers)
            ]
        if model.sliding_window is not None and window.first_layer is not None:
            keys[window.first_layer[0]] = model.windowed_layers[0]
    for key in family.attention:
        keys[key] = getattr(model, HF_ATTENTION[key])
        if key == "query_pre_attn_scalar":
            keys[key] = round(model.score_scale**-2)
        elif key == "rope_local_base_freq" and keys[key] is None:  # it has no null
            keys[key] = model.rope_theta
    return keys


def hf_shapes(model: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in a Hugging Face directory of this model, in model order."""
    family = model.architecture
    tables: dict[str, tuple[int, ...]] = {
        f"{table.hf}.weight": (model.size(table.rows), model.hidden_size) for table in model.tables
    }
    head = f"{family.output_layer.hf}.weight"
    shapes = {name: shape for name, shape in tables.items() if name != head}
    kinds: dict[bool, dict[str, tuple[int, ...]]] = {}  # as layers may have many experts
    for layer in range(model.num_layers):
        kind, prefix = model.has_experts(layer), family.hf_layer.format(i=layer)
        if kind not in kinds:
            kinds[kind] = _hf_layer_shapes(model, layer)
        shapes |= {prefix + name: shape for name, shape in kinds[kind].items()}
    last = family.final_norm
    shapes |= {f"{last.hf}.{kind}": (model.size(last.size),) for kind in family.norm_kinds}
    return shapes | tables  # the head, where it is another table, comes last


def _hf_layer_shapes(model: DecoderConfig, layer: int) -> dict[str, tuple[int, ...]]:
    """Of one layer, without its prefix."""
    found: dict[str, tuple[int, ...]] = {
        f"{norm.hf}.{kind}": (model.size(norm.size),)
        for norm in model.norms
        for kind in model.architecture.norm_kinds
    }
    for linear in model.linears_of(layer):
        for module, parts in linear.hf_modules().items():
            rows, columns = linear.rows_of(model, parts), model.size(linear.columns)
            weight = (columns, rows) if linear.is_transposed_in_hf else (rows, columns)
            found[f"{module}.weight"] = weight
            if linear.name in model.biases:
                found[f"{module}.bias"] = (rows,)
    return found | {x.hf: model.selector_shape(x) for x in model.selectors_of(layer)}

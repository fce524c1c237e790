"""What a description says of experts, checked: against its family, and against what is built of it."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING

from mqat.errors import UserError

if TYPE_CHECKING:
    from mqat.models.decoder import DecoderConfig


def check_experts(model: DecoderConfig) -> None:
    """Refuses what no mixture has, what Megatron-Core computes otherwise, and what no config.json says.

    Raises:
        UserError: Names the field, its value, and the rule.
    """
    mixture = model.architecture.mixture
    if not model.normalizes_heads and model.architecture.head_norms_switch is None:
        raise UserError(
            f"normalizes_heads=False: the config.json of a {model.family} model cannot say that."
        )
    if (mixture is not None) != bool(model.num_experts):
        raise UserError(
            f"num_experts={model.num_experts}: a {model.family} model has "
            f"{'none' if mixture is None else 'experts in every layer or in most'}."
        )
    if mixture is None:
        _check_said(model)
        return
    if 0 in (model.experts_per_token, model.expert_intermediate_size):
        raise UserError(
            f"experts_per_token={model.experts_per_token}, expert_intermediate_size="
            f"{model.expert_intermediate_size}: must be at least 1 where there are experts."
        )
    if model.experts_per_token > model.num_experts:
        raise UserError(
            f"experts_per_token={model.experts_per_token} of num_experts={model.num_experts}: a token "
            "cannot go to more experts than there are."
        )
    if mixture.normalizes is None and not model.normalizes_expert_weights:
        raise UserError(
            f"normalizes_expert_weights=False: the weights of a token's experts add up to one in "
            f"every {model.family} model; its config.json has no key that says otherwise."
        )
    if mixture.scores == "sigmoid" and not model.normalizes_expert_weights:
        raise UserError(
            "normalizes_expert_weights=False: Megatron-Core divides sigmoid scores of a token's "
            "experts by their sum, always."
        )
    if model.experts_per_token == 1 and model.normalizes_expert_weights:
        raise UserError(
            "experts_per_token=1 with normalized weights: the one expert's weight is always 1, so "
            "the router could not learn, and Megatron-Core refuses it."
        )
    _check_said(model)
    _check_dense_layers(model)
    _check_groups(model)


def _check_said(model: DecoderConfig) -> None:
    """Refuses what the family cannot say, or must."""
    mixture = model.architecture.mixture
    has_shared = mixture is not None and mixture.experts.shared is not None
    if has_shared != bool(model.shared_intermediate_size):
        raise UserError(
            f"shared_intermediate_size={model.shared_intermediate_size}: a {model.family} model has "
            f"{'a shared expert in each layer with experts' if has_shared else 'no shared experts'}."
        )
    count, size = model.shared_intermediate_size, model.expert_intermediate_size
    if mixture is not None and mixture.shared_count is not None and count % size:
        raise UserError(
            f"shared_intermediate_size={count} is no multiple of expert_intermediate_size={size}, by "
            f"which {mixture.shared_count} in the config.json of a {model.family} model counts."
        )
    said = {
        "dense_layers": mixture is not None and mixture.dense is not None,
        "expert_groups": mixture is not None and mixture.groups is not None,
        "expert_groups_per_token": mixture is not None and mixture.groups is not None,
        "expert_weight_scale": mixture is not None and mixture.scaling is not None,
    }
    plain = {known.name: known.default for known in fields(model)}
    for name, is_said in said.items():
        if not is_said and getattr(model, name) != plain[name]:
            raise UserError(
                f"model.{name}={getattr(model, name)!r}: the config.json of a {model.family} model "
                "cannot say that."
            )


def _check_dense_layers(model: DecoderConfig) -> None:
    mixture, layers = model.architecture.mixture, model.dense_layers
    wrong = any(not 0 <= layer < model.num_layers for layer in layers)
    if wrong or sorted(set(layers)) != [*layers] or len(layers) == model.num_layers:
        raise UserError(
            f"model.dense_layers={[*layers]}: must be increasing numbers of {model.num_layers} layers, "
            "and not of all: a mixture has experts somewhere."
        )
    is_first = mixture is not None and mixture.dense is not None and mixture.dense.first
    if is_first and layers != tuple(range(len(layers))):
        raise UserError(
            f"model.dense_layers={[*layers]}: must be the first ones, which is all that the "
            f"config.json of a {model.family} model can say."
        )


def _check_groups(model: DecoderConfig) -> None:
    """Refuses groups that do not fit, or that Megatron-Core limits by another sum of scores."""
    count, chosen, experts = model.expert_groups, model.expert_groups_per_token, model.num_experts
    if (
        experts % count
        or not 1 <= chosen <= count
        or experts // count * chosen < model.experts_per_token
    ):
        raise UserError(
            f"expert_groups={count}, of which expert_groups_per_token={chosen}: num_experts="
            f"{experts} must be cut evenly, and hold experts_per_token={model.experts_per_token}."
        )
    if model.limits_groups and (model.experts_per_token // chosen != 2 or experts < 2 * count):
        raise UserError(
            f"experts_per_token={model.experts_per_token} from expert_groups_per_token={chosen} of "
            f"expert_groups={count}: groups are chosen by the sum of their best two scores, but by "
            "Megatron-Core by as many as experts_per_token // expert_groups_per_token, which must "
            "therefore be two."
        )

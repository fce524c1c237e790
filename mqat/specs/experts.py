"""Layer specs of mixtures of experts: Megatron's, with quantized linears in each expert."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.spec_utils import ModuleSpec

from mqat.errors import UserError
from mqat.models.experts import MIXTURE_NORM, SHARED_EXPERTS
from mqat.models.structure import EXPERTS, FC1, FC2
from mqat.parallel.experts import QuantExperts, QuantMoELayer
from mqat.runtime.megatron_releases import submodules_of, with_submodules
from mqat.specs.slots import class_name, spec_slot, with_slots

_MIXTURE = "mlp"


def check_mixture(spec: Any, *, has_shared: bool) -> None:
    """Refuses a layer spec whose mixture is not Megatron's with one MLP after the other.

    Args:
        spec: Of a layer with experts.
        has_shared: Some are shared.

    Raises:
        UserError: Names the slot, what it holds, and what would do.
    """
    wanted = {
        _MIXTURE: (MoELayer, QuantMoELayer),
        EXPERTS: (SequentialMLP, QuantExperts),
        "mlp.router": (TopKRouter,),
    }
    names = {slot: [known.__name__ for known in classes] for slot, classes in wanted.items()}
    if has_shared:
        names[SHARED_EXPERTS] = [SharedExpertMLP.__name__, "_build_shared_experts"]
    for slot, known in names.items():
        held = class_name(spec_slot(spec, slot))
        if held not in known:
            raise UserError(
                f"layer spec: the slot {slot} holds {held}, but the model has experts, whose linears "
                f"are quantized one by one: it must hold {known[0]}. Build the spec with "
                "moe_grouped_gemm=False, or use mqat.specs.backend.gpt_layer_spec()."
            )


def with_experts(spec: Any, linears: Mapping[str, ModuleSpec]) -> Any:
    """A copy of a layer spec whose experts, and shared ones, have these linears, by their names in it.

    Checkpoints of it have the names of Megatron's Transformer-Engine spec.
    """
    activation = submodules_of(spec_slot(spec, EXPERTS)).activation_func

    def slots(owner: str) -> MLPSubmodules:
        return MLPSubmodules(
            linear_fc1=linears[f"{owner}.{FC1.kind}"],
            linear_fc2=linears[f"{owner}.{FC2.kind}"],
            activation_func=activation,
        )

    owners = list(dict.fromkeys(name.rpartition(".")[0] for name in linears))
    experts = [slots(owner) for owner in owners if owner != SHARED_EXPERTS]
    submodules = submodules_of(spec_slot(spec, _MIXTURE))
    held = ModuleSpec(module=QuantExperts, params={"experts": experts})
    shared = None
    if SHARED_EXPERTS in owners:
        shared = ModuleSpec(module=SharedExpertMLP, submodules=slots(SHARED_EXPERTS))
    mixture = with_submodules(
        ModuleSpec(module=QuantMoELayer), replace(submodules, experts=held, shared_experts=shared)
    )
    found = with_slots(spec, {_MIXTURE: mixture})
    # The norm before the router keeps its own name in checkpoints, as in Transformer-Engine models.
    keys = dict(found.submodules.sharded_state_dict_keys_map)
    keys.pop(f"{MIXTURE_NORM.name}.", None)
    return replace(found, submodules=replace(found.submodules, sharded_state_dict_keys_map=keys))

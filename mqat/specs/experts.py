"""Layer specs of mixtures of experts: Megatron's, with quantized linears in each expert."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.spec_utils import ModuleSpec

from mqat.errors import UserError
from mqat.models.structure import EXPERTS, FC1, FC2, MIXTURE_NORM
from mqat.parallel.experts import QuantExperts, QuantMoELayer
from mqat.runtime.megatron_releases import submodules_of, with_submodules
from mqat.specs.slots import class_name, spec_slot, with_slots

_MIXTURE = "mlp"


def check_mixture(spec: Any) -> None:
    """Refuses a layer spec whose mixture is not Megatron's with one MLP after the other.

    Raises:
        UserError: Names the slot, what it holds, and what would do.
    """
    wanted = {
        _MIXTURE: (MoELayer, QuantMoELayer),
        EXPERTS: (SequentialMLP, QuantExperts),
        "mlp.router": (TopKRouter,),
    }
    for slot, classes in wanted.items():
        held = class_name(spec_slot(spec, slot))
        if held not in [known.__name__ for known in classes]:
            raise UserError(
                f"layer spec: the slot {slot} holds {held}, but the model has experts, whose linears "
                f"are quantized one by one: it must hold {classes[0].__name__}. Build the spec with "
                "moe_grouped_gemm=False, or use mqat.specs.backend.gpt_layer_spec()."
            )


def with_experts(spec: Any, linears: Mapping[str, ModuleSpec]) -> Any:
    """A copy of a layer spec whose experts have these linears, by their names in the layer.

    Checkpoints of it have the names of Megatron's Transformer-Engine spec.
    """
    count = len(linears) // 2
    activation = submodules_of(spec_slot(spec, EXPERTS)).activation_func
    fc1, fc2 = (linear.name.rpartition(".")[2] for linear in (FC1, FC2))
    experts = [
        MLPSubmodules(
            linear_fc1=linears[f"{EXPERTS}.{number}.{fc1}"],
            linear_fc2=linears[f"{EXPERTS}.{number}.{fc2}"],
            activation_func=activation,
        )
        for number in range(count)
    ]
    submodules = submodules_of(spec_slot(spec, _MIXTURE))
    held = ModuleSpec(module=QuantExperts, params={"experts": experts})
    mixture = with_submodules(
        ModuleSpec(module=QuantMoELayer), replace(submodules, experts=held, shared_experts=None)
    )
    found = with_slots(spec, {_MIXTURE: mixture})
    # The norm before the router keeps its own name in checkpoints, as in Transformer-Engine models.
    keys = dict(found.submodules.sharded_state_dict_keys_map)
    keys.pop(f"{MIXTURE_NORM.name}.", None)
    return replace(found, submodules=replace(found.submodules, sharded_state_dict_keys_map=keys))

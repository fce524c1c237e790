"""Transformer Engine around mqat's linears: detected, never required, never imported on a CPU.

Its stock layer specs keep the norms of a layer inside the linears behind them (`FUSED_LINEAR`), with
`IdentityOp` in the norms' own slots. Quantizing needs the two apart: the norm becomes
`elementwise.Norm`, whose weight checkpoints hold under the fused linear's name, so that those of
Transformer-Engine models load and save. Its attention stays as it is: flash and fused kernels, packed
sequences, context parallelism.

Names are Megatron-Core's (`extensions/transformer_engine.py`), of 0.16 to 0.19.
"""

import importlib.util
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec

from mqat.errors import UserError
from mqat.models.structure import CORE_ATTENTION, Linear
from mqat.runtime.megatron_releases import submodules_of
from mqat.specs.elementwise import Norm
from mqat.specs.packed import with_document_ends
from mqat.specs.slots import class_name, spec_slot, with_slots

ATTENTION = "TEDotProductAttention"
FUSED_LINEAR = "TELayerNormColumnParallelLinear"
LINEARS = {
    "column": (ColumnParallelLinear.__name__, "TEColumnParallelLinear", FUSED_LINEAR),
    "row": (RowParallelLinear.__name__, "TERowParallelLinear"),
}
# What computes a whole MLP, or all experts, in one module -> what to build the spec with instead.
UNSPLIT = {
    "TEFusedMLP": "use_te_op_fuser=False",
    "TEFusedMLPWithGroupedLinear": "use_te_op_fuser=False",
    "MoELayer": "num_experts=None, as the model is described as dense",
}


def is_available() -> bool:
    """Whether Transformer Engine is installed and this process computes on CUDA."""
    return torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None


def core_attention() -> Any:
    """Megatron's `TEDotProductAttention`, which `with_document_ends` hands packed documents to.

    Raises:
        UserError: Transformer Engine is not there.
    """
    if not is_available():
        raise UserError(
            "model.transformer_engine=true: Transformer Engine is not installed, or there is no CUDA "
            "device; install mqat[te] on a machine with one, or set it to false for torch's attention."
        )
    from megatron.core.extensions.transformer_engine import TEDotProductAttention

    return with_document_ends(TEDotProductAttention)


def adapt_layer_spec(spec: Any, linears: Sequence[Linear], *, has_experts: bool = False) -> Any:
    """A copy of a Transformer-Engine layer spec for quantized linears; others as given.

    Its norms are modules of their own, and its attention takes mqat's packed documents. `linears` are
    those outside of experts.

    Raises:
        UserError: A slot holds something else than Megatron's or Transformer Engine's own linears, which
            a quantized linear would replace together with what it adds.
    """
    _check_replaceable(spec, linears, has_experts=has_experts)
    keys, split = {}, {}
    for linear in linears:
        if linear.norm is not None:
            keys[f"{linear.norm}."] = f"{linear.name}.layer_norm_"
            is_fused = class_name(spec_slot(spec, linear.name)) == FUSED_LINEAR
            if is_fused and spec_slot(spec, linear.norm) in (None, IdentityOp):
                split[linear.norm] = Norm
    attention = spec_slot(spec, CORE_ATTENTION.name)
    if class_name(attention) == ATTENTION:
        of_documents = (
            replace(attention, module=with_document_ends(attention.module))
            if isinstance(attention, ModuleSpec)
            else with_document_ends(attention)
        )
        spec = with_slots(spec, {CORE_ATTENTION.name: of_documents})
    if not split:
        return spec
    apart = with_slots(spec, split)
    return replace(apart, submodules=replace(apart.submodules, sharded_state_dict_keys_map=keys))


def _check_replaceable(spec: Any, linears: Sequence[Linear], *, has_experts: bool) -> None:
    mlp = class_name(spec_slot(spec, "mlp"))
    if mlp in UNSPLIT and not has_experts:
        raise UserError(
            f"layer spec: the slot mlp holds {mlp}, whose linears cannot be replaced one by one; build "
            f"the spec with {UNSPLIT[mlp]}."
        )
    for linear in linears:
        slot, known = spec_slot(spec, linear.name), LINEARS[linear.parallel]
        if slot is not None and (class_name(slot) not in known or submodules_of(slot) is not None):
            raise UserError(
                f"layer spec: the slot {linear.name} holds {class_name(slot)}, which a quantized linear "
                f"would replace together with what it adds; those that can be are {', '.join(known)}."
            )

"""Quantizer state as sharded checkpoint tensors, so that TP, PP and DP may change on load.

It lives beside the model under keys of its own (`models.structure.quantizer_key`; dynamic scales have
none); the model's own keys stay exactly Megatron's, and such a checkpoint still loads into an
unquantized Megatron model. Learned scales are stored as they are used, so that the checkpoint is what
is served; the optimizer's state holds the parameter behind each besides, so that training goes on from
that.

| scale (zero point) of        | global shape      | cut over TP                               |
|------------------------------|-------------------|-------------------------------------------|
| input, output, tensor, global| (1,)              | replicated                                |
| cached keys and values       | (1,)              | replicated                                |
| column-parallel, per channel | (O,)              | dim 0, gate and up separately             |
| column-parallel, per group   | (O, G)            | dim 0, gate and up separately             |
| embedding, per channel       | (padded V,)       | dim 0                                     |
| embedding, per group         | (padded V, G)     | dim 0                                     |
| row-parallel, per channel    | (O,)              | replicated                                |
| row-parallel, per group      | (O, G)            | dim 1                                     |
| either, per square           | (O/size, I/size)  | as the weight                             |

Adapters lie beside it likewise (`models.structure.adapter_key`), cut as `lora.py` says, and packed
weights (`packed_key`), whose units (`kernels/frozen_codes.py`) are cut along their first dimension.
"""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from torch import Tensor

from mqat.kernels.frozen_codes import FrozenCodes
from mqat.models.structure import adapter_key, packed_key, quantizer_key
from mqat.parallel.add_adapters import adapters_of
from mqat.parallel.linear import quantized_linears, tp_axis
from mqat.parallel.quantized_module import QuantizedModule, quantized_modules


def quantizer_sharded_state(model: Any, *, dp_group: dist.ProcessGroup) -> dict[str, Any]:
    """Sharded entries for what is frozen of every quantizer in `model` (or list of chunks).

    Key -> ShardedTensor (or factory, for fused gate/up), to merge into the model's own
    `sharded_state_dict()` before saving, or to load into. The first rank of `dp_group` (with context
    parallel) writes.
    """
    return {
        quantizer_key(name, kind, part): _entry(module, name, kind, part, tensor, dp_group)
        for name, module in quantized_modules(model).items()
        for kind, quantizer in module.quantizers.items()
        for part, tensor in quantizer.frozen_tensors.items()
    }


def learned_sharded_state(model: Any, *, dp_group: dist.ProcessGroup) -> dict[str, Any]:
    """Sharded entries of the parameters that are learned scales, for the optimizer to find them by.

    Arguments and result as for `quantizer_sharded_state`, under the same keys.
    """
    return {
        quantizer_key(name, kind, "scale"): _entry(
            module, name, kind, "scale", quantizer.scale, dp_group
        )
        for name, module in quantized_modules(model).items()
        for kind, quantizer in module.quantizers.items()
        if quantizer.rule is not None
    }


def adapter_sharded_state(model: Any, *, dp_group: dist.ProcessGroup) -> dict[str, Any]:
    """Sharded entries of every adapter's A and B, to save and to load into; the optimizer finds them so.

    Arguments and result as for `quantizer_sharded_state`.
    """
    found, linears = dict[str, Any](), quantized_linears(model)
    for name, adapter in adapters_of(model).items():
        rank, size = adapter.tp_group.rank(), adapter.tp_group.size()
        a_axis, b_axis = (1, None) if adapter.is_row else (None, 0)
        for key, tensor, axis in (
            (adapter_key(name, "in"), adapter.linear_in, a_axis),
            (adapter_key(name, "out"), adapter.linear_out, b_axis),
        ):
            entry = ShardedTensor.from_rank_offsets(
                key,
                tensor,
                *([] if axis is None else [(axis, rank, size)]),
                replica_id=(0, rank if axis is None else 0, dp_group.rank()),
            )
            is_fused = linears[name].parts == 2 and axis == 0
            found[key] = apply_swiglu_sharded_factory(entry, ()) if is_fused else entry
    return found


def packed_sharded_state(model: Any, *, dp_group: dist.ProcessGroup) -> dict[str, Any]:
    """Sharded entries of every packed weight, to save; arguments and result as above."""
    found = dict[str, Any]()
    for name, linear in quantized_linears(model).items():
        storage = None if linear.packed_weight is None else linear.packed_weight.storage
        for part, tensor in storage.tensors.items() if isinstance(storage, FrozenCodes) else ():
            rank, size = linear.tp_group.rank(), linear.tp_group.size()
            entry = ShardedTensor.from_rank_offsets(
                packed_key(name, part), tensor, (0, rank, size), replica_id=(0, 0, dp_group.rank())
            )
            is_fused = linear.parts == 2
            found[packed_key(name, part)] = (
                apply_swiglu_sharded_factory(entry, ()) if is_fused else entry
            )
    return found


def load_adapters_(model: Any, state: dict[str, Tensor]) -> None:
    """Copies what was loaded into every adapter; the inverse of the above."""
    with torch.no_grad():
        for name, adapter in adapters_of(model).items():
            adapter.linear_in.copy_(state[adapter_key(name, "in")])
            adapter.linear_out.copy_(state[adapter_key(name, "out")])


def _entry(
    module: QuantizedModule,
    name: str,
    kind: str,
    part: str,
    tensor: Tensor,
    dp_group: dist.ProcessGroup,
) -> Any:
    tp_rank, tp_size = module.tp_group.rank(), module.tp_group.size()
    axis = tp_axis(module, kind, part)
    if module.expert_groups is not None:
        dp_group = module.expert_groups.dp
    offsets = [] if axis is None else [(axis, tp_rank, tp_size)]
    entry = ShardedTensor.from_rank_offsets(
        quantizer_key(name, kind, part),
        tensor,
        *offsets,
        replica_id=(0, tp_rank if axis is None else 0, dp_group.rank()),
    )
    return apply_swiglu_sharded_factory(entry, ()) if module.parts == 2 and axis == 0 else entry


def load_quantizer_state_(model: Any, state: dict[str, Tensor]) -> None:
    """Freezes every quantizer at what was loaded for it; the inverse of the above."""
    for name, module in quantized_modules(model).items():
        for kind, quantizer in module.quantizers.items():
            quantizer.load_(
                {part: state[quantizer_key(name, kind, part)] for part in quantizer.frozen_tensors}
            )

"""Scales and rounding of some layers' weights, from statistics that every rank of a stage shares.

Work is done on row shards (`tp_invariant_shards.py`); what decides about a whole tensor is added over
shards through tensors with a slot for every shard, one collective for all linears.
"""

from collections.abc import Collection, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from mqat.calibration.clipping import WeightShard
from mqat.calibration.clipping_methods import CLIPPING_METHODS
from mqat.calibration.gptq import inverse_factor, round_shard
from mqat.calibration.input_hessian import InputHessian
from mqat.calibration.tp_invariant_shards import local_from_shards, of_all_shards, row_shards
from mqat.parallel.linear import QuantizedLinear
from mqat.parallel.reduce import all_reduce_fused_
from mqat.quant.algorithm import Recipe
from mqat.quant.granularity import PerGroup, PerTensor
from mqat.quant.qparams import frozen_qparams, statistic_of
from mqat.quant.scheme import TensorScheme


def _weight_scheme(linear: QuantizedLinear) -> TensorScheme:
    assert linear.weight_quantizer is not None, "only linears with quantized weights get here"
    return linear.weight_quantizer.scheme


def _has_one_scale(linear: QuantizedLinear) -> bool:
    return isinstance(_weight_scheme(linear).granularity, PerTensor)


class WeightCalibrator:
    """Linears of this rank, the statistics of their inputs, and what has been decided so far.

    Args:
        linears: By name, in model order; the same names on all ranks of the stage.
        recipes: Of each of them.
        scales: Rescalings that were folded, float32 [I], by linear; others' inputs are as they were.
        input_hessians: Merged statistics, of those whose recipe needs them.

    Attributes:
        statistics: Maxima or ranges that scales are made from, one for each of this rank's shards, of
            weights whose recipe chooses scales.
        global_amax: float32 (1,), where such a weight has two levels of scales.
        frozen: The tensors that will be frozen, for each shard.
    """

    def __init__(
        self,
        linears: Mapping[str, QuantizedLinear],
        recipes: Mapping[str, Recipe],
        scales: Mapping[str, Tensor],
        input_hessians: Mapping[str, InputHessian],
    ) -> None:
        self.linears = linears
        self.recipes = recipes
        self.scales = scales
        self.input_hessians = input_hessians
        self.statistics: dict[str, list[Tensor]] = {}
        self.global_amax: dict[str, Tensor] = {}
        self.frozen: dict[str, list[dict[str, Tensor]]] = {}

    def _reduce(self, tensors: Mapping[str, Tensor], op: dist.ReduceOp.RedOpType) -> None:
        if tensors:
            group = next(iter(self.linears.values())).tp_group
            all_reduce_fused_(list(tensors.values()), op, group)

    def _hessian(self, name: str) -> Tensor:
        """XᵀX of the input as it is after rescaling, float64 [I, I]."""
        hessian = self.input_hessians[name].matrix(self.linears[name])
        scale = self.scales.get(name)
        return hessian if scale is None else hessian / torch.outer(scale.double(), scale.double())

    def choose_scales(self) -> None:
        """Fills `frozen`, for weights whose recipe has a calibrator of its own or rounds them."""
        chosen = {
            name: linear
            for name, linear in self.linears.items()
            if linear.weight_quantizer is not None and self.recipes[name].chooses_scales
        }
        for name, linear in chosen.items():
            scheme = _weight_scheme(linear)
            self.statistics[name] = [statistic_of(s, scheme) for s in row_shards(linear)]
        shared = {
            name: torch.stack([s.amax().reshape(1) for s in self.statistics[name]]).amax(dim=0)
            for name, linear in chosen.items()
            if _weight_scheme(linear).has_global_scale
        }
        single = {
            name: torch.stack(self.statistics[name]).amax(dim=0)
            for name, linear in chosen.items()
            if _has_one_scale(linear)
        }
        self._reduce(shared | single, dist.ReduceOp.MAX)
        for name, amax in shared.items():
            method = CLIPPING_METHODS.get(self.recipes[name].weight_calibrator)
            self.global_amax[name] = amax if method is None else amax * method.headroom
        for name, value in single.items():
            self.statistics[name] = [value] * len(self.statistics[name])
        self._clip(single)
        for name, statistics in self.statistics.items():
            scheme, above = _weight_scheme(self.linears[name]), self.global_amax.get(name)
            self.frozen[name] = [frozen_qparams(s, scheme, above) for s in statistics]

    def _clip(self, single: Collection[str]) -> None:
        """Replaces statistics by what the recipes' clipping methods choose."""
        measured = {
            name: self._measured(name)
            for name in self.statistics
            if self.recipes[name].weight_calibrator in CLIPPING_METHODS
        }
        sums = {
            name: torch.stack([m.sum(dim=(1, 2)) for m in found], dim=-1)
            for name, found in measured.items()
            if name in single
        }
        for name, of_shards in of_all_shards(self.linears, sums).items():
            total = of_shards.sum(dim=-1)[:, None, None]
            measured[name] = [total] * len(measured[name])
        for name, found in measured.items():
            method = CLIPPING_METHODS[self.recipes[name].weight_calibrator]
            scheme = _weight_scheme(self.linears[name])
            pairs = zip(self.statistics[name], found, strict=True)
            self.statistics[name] = [method.choose(s, m, scheme) for s, m in pairs]

    def _measured(self, name: str) -> list[Tensor]:
        """What the method looks at, for each shard."""
        linear, method = self.linears[name], CLIPPING_METHODS[self.recipes[name].weight_calibrator]
        scheme, above = _weight_scheme(linear), self.global_amax.get(name)
        hessian = self._hessian(name) if method.needs_input_hessian else None
        pairs = zip(row_shards(linear), self.statistics[name], strict=True)
        return [method.measure(WeightShard(w, s, scheme, above, hessian)) for w, s in pairs]

    def round_(self) -> None:
        """Moves weights to values of their frozen grids, errors compensated within each row.

        Not those of an expert that no token reached, whose errors nobody knows: they are rounded to
        nearest when they are used.
        """
        for name, frozen in self.frozen.items():
            linear = self.linears[name]
            is_idle = name in self.input_hessians and not int(self.input_hessians[name].tokens)
            if self.recipes[name].rounding != "gptq" or is_idle:
                continue
            scheme = _weight_scheme(linear)
            factor, order = inverse_factor(self._hessian(name))
            pairs = zip(row_shards(linear), frozen, strict=True)
            shards = [round_shard(w, f, factor, order, scheme) for w, f in pairs]
            weight = linear.weight.detach()
            weight.copy_(local_from_shards(linear, shards, per_column=True).to(weight.dtype))

    def local_qparams(self) -> dict[str, dict[str, Tensor]]:
        """What this rank's weight quantizers are to freeze, by linear."""
        found: dict[str, dict[str, Tensor]] = {}
        for name, frozen in self.frozen.items():
            linear = self.linears[name]
            per_column = isinstance(_weight_scheme(linear).granularity, PerGroup)
            is_shared = _has_one_scale(linear)
            found[name] = {
                part: tensor
                if is_shared or part == "global_scale"
                else local_from_shards(linear, [f[part] for f in frozen], per_column=per_column)
                for part, tensor in frozen[0].items()
            }
        return found

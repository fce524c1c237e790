"""A recipe's steps on one block of layers, from statistics that every rank of a stage shares.

Work is done on row tiles (`tiles.py`); what decides about a whole tensor is added over tiles through
tables with a slot for every tile, one collective for all linears of the block.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from mqat.calibration import weights
from mqat.calibration.gptq import inverse_factor, round_tile
from mqat.calibration.input_hessian import InputHessian, input_width
from mqat.calibration.recipe import Recipe
from mqat.calibration.search import (
    InputStatistics,
    best_candidate,
    candidate_scales,
    smoothquant_scale,
    tile_losses,
)
from mqat.calibration.smoothing_pairs import SmoothingPair, round_scale
from mqat.calibration.tp_invariant_shards import (
    local_from_tiles,
    output_width,
    row_tiles,
    tile_count,
    tile_numbers,
)
from mqat.errors import UserError
from mqat.parallel.linear import QuantizedLinear
from mqat.parallel.reduce import all_reduce_fused_
from mqat.quant.granularity import PerBlock, PerGroup, PerTensor
from mqat.quant.qparams import statistic_of
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
        pairs: Those whose input can be rescaled.
        input_hessians: Merged statistics; empty if the recipe needs none.
        recipe: What to do.

    Attributes:
        scales: Rescalings that were folded, float32 [I], by pair.
        statistics: Maxima or ranges that scales will be made from, one for each of this rank's tiles.
        global_amax: float32 (1,), where a weight has two levels of scales.
    """

    def __init__(
        self,
        linears: Mapping[str, QuantizedLinear],
        pairs: Mapping[str, SmoothingPair],
        input_hessians: Mapping[str, InputHessian],
        recipe: Recipe,
    ) -> None:
        self.linears = linears
        self.pairs = pairs
        self.input_hessians = input_hessians
        self.recipe = recipe
        self.scales: dict[str, Tensor] = {}
        self.statistics: dict[str, list[Tensor]] = {}
        self.global_amax: dict[str, Tensor] = {}
        self.quantized = {n: x for n, x in linears.items() if x.weight_quantizer is not None}

    def _reduce(self, tensors: Mapping[str, Tensor], op: dist.ReduceOp.RedOpType) -> None:
        if tensors:
            group = next(iter(self.linears.values())).tp_group
            all_reduce_fused_(list(tensors.values()), op, group)

    def _tables(self, local: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """float64 [..., this rank's tiles] by linear -> [..., all tiles]."""
        tables = {}
        for name, values in local.items():
            linear = self.linears[name]
            tables[name] = values.new_zeros(*values.shape[:-1], tile_count(linear))
            tables[name][..., tile_numbers(linear)] = values
        self._reduce(tables, dist.ReduceOp.SUM)
        return tables

    def _hessian(self, name: str) -> Tensor:
        """XᵀX of the input as it is after rescaling, float64 [I, I]."""
        hessian = self.input_hessians[name].matrix(self.linears[name])
        scale = self.scales.get(name)
        return hessian if scale is None else hessian / torch.outer(scale.double(), scale.double())

    def _column_amax(self) -> dict[str, Tensor]:
        """Largest |W_oj| of each input channel j, float32 [I], by pair."""
        amax = {}
        for name in self.pairs:
            tiles = row_tiles(self.linears[name])
            amax[name] = torch.stack([tile.abs().amax(dim=0) for tile in tiles]).amax(dim=0)
        self._reduce(amax, dist.ReduceOp.MAX)
        return amax

    def smoothquant_(self) -> None:
        """Chooses a rescaling for every pair and folds it."""
        columns = self._column_amax()
        if self.recipe.alpha is None:
            self.scales = self._searched_scales(columns)
        else:
            for name, pair in self.pairs.items():
                x, w = pair.tied(self.input_hessians[name].amax), pair.tied(columns[name])
                raw = smoothquant_scale(x, w, self.recipe.alpha)
                self.scales[name] = round_scale(raw, self.recipe.grid)
        for name, scale in self.scales.items():
            self.pairs[name].fold_(scale)

    def _searched_scales(self, columns: Mapping[str, Tensor]) -> dict[str, Tensor]:
        candidates: dict[str, Tensor] = {}
        losses: dict[str, Tensor] = {}
        for name, pair in self.pairs.items():
            input_hessian, linear = self.input_hessians[name], self.linears[name]
            inputs = InputStatistics(
                input_hessian.matrix(linear), input_hessian.amax, int(input_hessian.tokens)
            )
            candidates[name] = candidate_scales(
                pair,
                inputs,
                columns[name],
                steps=self.recipe.search_steps,
                grid=self.recipe.grid,
            )
            quantizers = linear.quantizers
            schemes = {kind: quantizer.scheme for kind, quantizer in quantizers.items()}
            losses[name] = tile_losses(
                row_tiles(linear), inputs, candidates[name], schemes.get("weight"),
                schemes.get("input"),
            )  # fmt: skip
        tables = self._tables(losses)
        return {name: candidates[name][best_candidate(tables[name])] for name in tables}

    def choose_clipping_points(self) -> None:
        """Fills `statistics`: what each tile's scales are made from, by quantized weight."""
        for name, linear in self.quantized.items():
            scheme = _weight_scheme(linear)
            if isinstance(scheme.granularity, PerBlock):
                raise UserError(
                    f"{name}: weights in squares ({scheme.granularity}) span the tiles that are worked "
                    "on; keep quantization.weight_calibrator=max and rounding=nearest for them."
                )
            self.statistics[name] = [statistic_of(t, scheme) for t in row_tiles(linear)]
        shared = {
            name: torch.stack([s.amax().reshape(1) for s in self.statistics[name]]).amax(dim=0)
            for name, linear in self.quantized.items()
            if _weight_scheme(linear).has_global_scale
        }
        single = {
            name: torch.stack(self.statistics[name]).amax(dim=0)
            for name, linear in self.quantized.items()
            if _has_one_scale(linear)
        }
        self._reduce(shared | single, dist.ReduceOp.MAX)
        self.global_amax = shared
        for name, value in single.items():
            self.statistics[name] = [value] * len(self.statistics[name])
        if self.recipe.weight_method != "max":
            self._shrink(list(single))

    def _shrink(self, single: list[str]) -> None:
        evidence = {name: self._evidence(name) for name in self.quantized}
        sums = {n: torch.stack([e.sum(dim=(1, 2)) for e in evidence[n]], dim=-1) for n in single}
        totals = {n: t.sum(dim=-1)[:, None, None] for n, t in self._tables(sums).items()}
        for name, statistics in self.statistics.items():
            found = [totals[name]] * len(statistics) if name in totals else evidence[name]
            pairs = zip(statistics, found, strict=True)
            self.statistics[name] = [self._chosen(name, s, e) for s, e in pairs]

    def _evidence(self, name: str) -> list[Tensor]:
        """What the method looks at: sums for SAWB, errors of shrunken maxima for the others."""
        linear, method = self.linears[name], self.recipe.weight_method
        scheme, above = _weight_scheme(linear), self.global_amax.get(name)
        if method == "sawb":
            return [weights.sawb_sums(tile, scheme.granularity) for tile in row_tiles(linear)]
        hessian = self._hessian(name) if method == "awq" else None
        pairs = zip(row_tiles(linear), self.statistics[name], strict=True)
        return [weights.shrink_errors(tile, s, above, scheme, hessian) for tile, s in pairs]

    def _chosen(self, name: str, statistic: Tensor, evidence: Tensor) -> Tensor:
        linear = self.linears[name]
        scheme = _weight_scheme(linear)
        if self.recipe.weight_method != "sawb":
            return weights.shrunk(statistic, evidence, scheme.granularity)
        width, rows = input_width(linear), output_width(linear)
        counts = weights.group_counts(width, rows, scheme.granularity)
        return weights.sawb_amax(statistic, evidence, counts, scheme)

    def round_(self) -> None:
        """Moves weights to grid points, each row's errors compensated within the row."""
        for name, statistics in self.statistics.items():
            linear, above = self.linears[name], self.global_amax.get(name)
            scheme = _weight_scheme(linear)
            factor, order = inverse_factor(self._hessian(name))
            pairs = zip(row_tiles(linear), statistics, strict=True)
            tiles = [round_tile(t, s, above, factor, order, scheme) for t, s in pairs]
            weight = linear.weight.detach()
            weight.copy_(local_from_tiles(linear, tiles, per_column=True).to(weight.dtype))

    def local_statistics(self) -> dict[str, Tensor]:
        """What this rank's weight quantizers freeze their scales from."""
        found = {}
        for name, tiles in self.statistics.items():
            linear = self.linears[name]
            scheme = _weight_scheme(linear)
            if _has_one_scale(linear):
                found[name] = tiles[0]
                continue
            per_column = isinstance(scheme.granularity, PerGroup)
            if not scheme.is_asymmetric:
                found[name] = local_from_tiles(linear, tiles, per_column=per_column)
                continue
            ends = [t.movedim(0, -1) for t in tiles]  # rows first, as tiles are joined
            found[name] = local_from_tiles(linear, ends, per_column=per_column).movedim(-1, 0)
        return found

"""What GPTQ, AWQ's clipping and static inputs are worth when a linear saw few calibration tokens.

    python tools/few_tokens.py [--layers 5 15 25] [--counts 4 16 64 ...]

SmolLM2-135M's gate and down projections, as an expert's would be: INT4 in groups of 32 from the
statistics of so many tokens (drawn at random from training text), and the squared output error on
other text beside that of rounding to nearest, which needs no token. Static INT8 inputs beside those
with the maximum of all tokens. Below one: better. Float32, single rank.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from quality_peers import batches, load_model
from torch import Tensor

from mqat.calibration.clipping import WeightShard
from mqat.calibration.clipping_methods import CLIPPING_METHODS
from mqat.calibration.gptq import inverse_factor, round_shard
from mqat.checkpoints.source import open_pretrained
from mqat.config import DataConfig
from mqat.data.dataset import load_run_data
from mqat.data.packaged import smollm2_gguf
from mqat.data.packing import PackedDataset
from mqat.quant.algorithm import named_scheme
from mqat.quant.formats import INT8
from mqat.quant.functional import fake_quantize
from mqat.quant.granularity import PerTensor
from mqat.quant.qparams import frozen_qparams, rounded, statistic_of
from mqat.quant.scales import compute_scale
from mqat.quant.scheme import TensorScheme

COUNTS = (4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)


@torch.no_grad()
def collect_inputs(
    model: Any, linears: dict[str, Any], data: PackedDataset, rows: int
) -> dict[str, Tensor]:
    """Inputs of each linear over the first `rows` spread sequences, float32 [tokens, I]."""
    found: dict[str, list[Tensor]] = {name: [] for name in linears}

    def keep(name: str, _: Any, inputs: tuple[Tensor, ...]) -> None:
        found[name].append(inputs[0].flatten(0, 1))

    hooks = [x.register_forward_pre_hook(partial(keep, name)) for name, x in linears.items()]
    for step in batches(data, 1).spread(rows):
        for microbatch in step:
            model.model(microbatch["tokens"], use_cache=False)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts) for name, parts in found.items()}


def gptq(weight: Tensor, scheme: TensorScheme, hessian: Tensor) -> Tensor:
    """On the grid of its maxima, errors compensated."""
    factor, order = inverse_factor(hessian)
    return round_shard(
        weight, frozen_qparams(statistic_of(weight, scheme), scheme), factor, order, scheme
    )


def clipped(weight: Tensor, scheme: TensorScheme, hessian: Tensor) -> Tensor:
    """To nearest, on the grid that AWQ's search chooses."""
    method, statistic = CLIPPING_METHODS["awq"], statistic_of(weight, scheme)
    measured = method.measure(WeightShard(weight, statistic, scheme, None, hessian))
    return rounded(weight, scheme, method.choose(statistic, measured, scheme))


def input_error(weight: Tensor, held_out: Tensor, amax: Tensor) -> float:
    """Squared output error of static INT8 inputs."""
    scale = compute_scale(amax.reshape(1), INT8)
    error = fake_quantize(held_out, scale, INT8, PerTensor()) - held_out
    return float((error @ weight.t()).square().sum(dtype=torch.float64))


def ratios(
    weight: Tensor, seen: Tensor, held_out: Tensor, counts: Sequence[int]
) -> dict[int, list[float]]:
    """By count: the errors of GPTQ, of AWQ's clipping and of static inputs beside those named above."""
    algorithm = named_scheme("int4", group_size=32)
    assert algorithm is not None and algorithm.weight is not None
    scheme, test = algorithm.weight, held_out.t().double() @ held_out.double()

    def loss(quantized: Tensor) -> float:
        error = (quantized - weight).double()
        return float(((error @ test) * error).sum())

    nearest = loss(rounded(weight, scheme))
    whole = input_error(weight, held_out, seen.abs().amax())
    order = torch.randperm(len(seen), generator=torch.Generator().manual_seed(0))
    found = {}
    for count in counts:
        x = seen[order[:count]].double()
        hessian = x.t() @ x
        found[count] = [
            loss(gptq(weight, scheme, hessian)) / nearest,
            loss(clipped(weight, scheme, hessian)) / nearest,
            input_error(weight, held_out, x.abs().amax().float()) / whole,
        ]
    return found


def main() -> None:
    """Prints a table: a line a count, the median over layers and the worst."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 9, 16, 23])
    parser.add_argument("--counts", type=int, nargs="+", default=COUNTS)
    args = parser.parse_args()
    source = open_pretrained(smollm2_gguf())
    data = load_run_data(
        DataConfig(packaged="wikipedia", seq_length=256),
        model=source.config, source=source.tokenizer_source, checkpoint=None,
    )  # fmt: skip
    model = load_model(smollm2_gguf(), torch.float32)
    for module in ("gate_proj", "down_proj"):
        linears = {f"{i}": getattr(model.model.layers[i].mlp, module) for i in args.layers}
        seen = collect_inputs(model, linears, data.train, -(-max(args.counts) // 256) + 4)
        held_out = collect_inputs(model, linears, data.validation, 8)
        found = [
            ratios(x.weight.detach(), seen[name], held_out[name], args.counts)
            for name, x in linears.items()
        ]
        width = next(iter(linears.values())).in_features
        print(
            f"\n{module}, {width} inputs: | tokens | GPTQ | AWQ's clipping | static INT8 inputs |"
        )
        for count in args.counts:
            columns = zip(*(layer[count] for layer in found), strict=True)
            cells = [f"{statistics.median(c):.2f} (worst {max(c):.2f})" for c in columns]
            print(f"| {count} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()

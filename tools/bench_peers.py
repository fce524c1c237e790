"""Fake quantization of nvidia-modelopt and torchao on the benchmarks' Megatron model.

    python tools/bench_peers.py --precision bf16 --tokens 256 --json

Same model, data, optimizer and threads; each system takes turns with the unquantized baseline in a
process of their own (modelopt's and Megatron's globals would keep the models of earlier ones alive).
Without the `bench` extra (`pip install 'mqat[bench]'`) the peers' rows are left out, and a line on
stderr says so.

What the rows are:

| system   | algorithm | what runs                                                                     |
|----------|-----------|-------------------------------------------------------------------------------|
| modelopt | int8      | `INT8_DEFAULT_CFG`: weights per channel, inputs per tensor, calibrated        |
| modelopt | int4      | `INT4_BLOCKWISE_WEIGHT_ONLY_CFG`, blocks of 128                               |
| modelopt | fp8       | `FP8_DEFAULT_CFG`                                                             |
| torchao  | int8      | `IntxFakeQuantizer`: weights per channel, inputs per token, asymmetric        |
| torchao  | int4      | `IntxFakeQuantizer`: weights in groups of 128                                 |
| torchao  | 8da4w     | both: weights in groups of 128, inputs per token, asymmetric                  |
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from bench_model import (
    System,
    arguments,
    batches,
    build,
    llama,
    megatron_layer_spec,
    start,
    step,
)
from torch import Tensor

from mqat.runtime import groups

MODELOPT = {
    "int8": "INT8_DEFAULT_CFG",
    "int4": "INT4_BLOCKWISE_WEIGHT_ONLY_CFG",
    "fp8": "FP8_DEFAULT_CFG",
}
TORCHAO = ("int8", "int4", "8da4w")
_GROUP = 128
_LINEARS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")


def available() -> list[tuple[str, str]]:
    """(system, algorithm) of the peers that are installed; says on stderr which are not."""
    found: list[tuple[str, str]] = []
    for name, algorithms in (("modelopt", tuple(MODELOPT)), ("torchao", TORCHAO)):
        if importlib.util.find_spec(name) is None:
            print(f"{name} is not installed (pip install 'mqat[bench]'): no rows", file=sys.stderr)
            continue
        found += [(name, algorithm) for algorithm in algorithms]
    return found


def _calibrate_modelopt(chunk: Any, algorithm: str, data: list[dict[str, Any]]) -> None:
    import modelopt.torch.quantization as mtq

    def forward_loop(model: Any) -> None:
        for batch in data:
            model(batch["tokens"], batch["position_ids"], batch["attention_mask"])

    # Its own lists of what stays unquantized name `output_layer`, as Megatron does.
    mtq.quantize(chunk, getattr(mtq, MODELOPT[algorithm]), forward_loop)


def _torchao_quantizers(algorithm: str) -> tuple[Any, Any]:
    """Fake quantizers of inputs (or None) and weights."""
    from torchao.quantization.granularity import PerAxis, PerGroup, PerToken
    from torchao.quantization.qat import IntxFakeQuantizeConfig
    from torchao.quantization.qat.fake_quantizer import IntxFakeQuantizer

    def made(dtype: torch.dtype, granularity: Any, *, is_symmetric: bool) -> Any:
        return IntxFakeQuantizer(
            IntxFakeQuantizeConfig(dtype, granularity, is_symmetric=is_symmetric)
        )

    inputs = made(torch.int8, PerToken(), is_symmetric=False)
    if algorithm == "int8":
        return inputs, made(torch.int8, PerAxis(0), is_symmetric=True)
    weights = made(torch.int4, PerGroup(_GROUP), is_symmetric=True)
    return (None if algorithm == "int4" else inputs), weights


def _quantize_torchao(chunk: Any, algorithm: str) -> None:
    """Puts torchao's fake quantizers where its own `FakeQuantizedLinear` has them.

    That class replaces `nn.Linear`; Megatron's linears call `_forward_impl(input, weight, ...)` instead.
    """
    for name, linear in chunk.named_modules():
        if name.rpartition(".")[2] not in _LINEARS:
            continue
        inputs, weights = _torchao_quantizers(algorithm)
        original: Callable[..., Tensor] = linear._forward_impl

        def quantized(
            input: Tensor,
            weight: Tensor,
            *args: Any,
            _original: Callable[..., Tensor] = original,
            _inputs: Any = inputs,
            _weights: Any = weights,
            **kwargs: Any,
        ) -> Tensor:
            x = input if _inputs is None else _inputs(input)
            return _original(x, _weights(weight), *args, **kwargs)

        linear._forward_impl = quantized


def _as_megatrons_own(chunk: Any) -> None:
    """Gives linears that mqat left unquantized the class that peers look for."""
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

    from mqat.parallel.linear import QuantColumnParallelLinear, quantized_linears

    for linear in quantized_linears(chunk).values():
        is_column = isinstance(linear, QuantColumnParallelLinear)
        linear.__class__ = ColumnParallelLinear if is_column else RowParallelLinear


def build_peer(args: argparse.Namespace, name: str, algorithm: str) -> System:
    """The baseline's model with a peer's fake quantizers; trainable.

    Args:
        args: From `bench_model.arguments`.
        name: `modelopt` or `torchao`.
        algorithm: One that `available` lists.
    """
    from mqat.checkpoints.pretrained import load_pretrained_
    from mqat.checkpoints.random_weights import RandomWeights
    from mqat.config import ModelConfig, OptimizerConfig
    from mqat.specs.model import build_model
    from mqat.training.optimizer import build_optimizer, wrap_for_training

    model = llama(args)
    settings = ModelConfig(
        tensor_model_parallel_size=args.tp, sequence_parallel=args.sequence_parallel
    )
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    chunks: list[Any] = list(
        build_model(model, settings, {}, dtype, layer_spec=megatron_layer_spec())
    )
    load_pretrained_(chunks, RandomWeights(model, 1, 0.02))
    for chunk in chunks:
        _as_megatrons_own(chunk)
        if name == "modelopt":
            _calibrate_modelopt(chunk, algorithm, batches(args)[:1])
        else:
            _quantize_torchao(chunk, algorithm)
    chunks = wrap_for_training(chunks)
    optimizer, scheduler = build_optimizer(
        chunks, OptimizerConfig(lr=1e-5), max_steps=1000, clip_grad=1.0
    )
    return System(name, algorithm, chunks, optimizer, scheduler)


class SavedBytes:
    """Unique storages that autograd saves, parameters excluded, by what they belong to.

    `of_weights` are those with as many elements as the weight of the linear that runs: what a system
    keeps of each weight besides the parameter itself.
    """

    def __init__(self, model: torch.nn.Module, num_tokens: int) -> None:
        self.num_tokens = num_tokens
        self.parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.storages: dict[int, torch.UntypedStorage] = {}
        self.by_linears: set[int] = set()
        self.of_weights: set[int] = set()
        self.weight_shape: torch.Size | None = None
        self.num_weights = 0
        self.handles: list[Any] = []
        for name, module in model.named_modules():
            if name.rpartition(".")[2] in _LINEARS:
                self.num_weights += module.weight.numel()
                self.handles += [
                    module.register_forward_pre_hook(lambda m, _: self._enter(m.weight.shape)),
                    module.register_forward_hook(lambda *_: self._enter(None)),
                ]

    def _enter(self, shape: torch.Size | None) -> None:
        self.weight_shape = shape

    def pack(self, tensor: Tensor) -> Tensor:
        """Saved-tensor hook."""
        storage = tensor.untyped_storage()
        pointer = storage.data_ptr()
        if pointer not in self.parameters:
            self.storages[pointer] = storage  # kept, so that its address is not used again
            if self.weight_shape is not None:
                self.by_linears.add(pointer)
                # Groups change the shape, not the number; tokens come first in activations.
                is_activation = tensor.shape[:1] == (self.num_tokens,)
                if tensor.numel() == self.weight_shape.numel() and not is_activation:
                    self.of_weights.add(pointer)
        return tensor

    def bytes_of(self, pointers: set[int] | None = None) -> int:
        """Bytes of some storages, or of all."""
        own = self.storages if pointers is None else pointers
        return sum(self.storages[pointer].nbytes() for pointer in own)


def memory(system: System, data: list[dict[str, Any]]) -> dict[str, float]:
    """Forward passes of all microbatches with their graphs alive."""
    from mqat.parallel.linear import quantized_linears
    from mqat.parallel.quantized_step import quantized_step

    (chunk,) = system.chunks
    saved = SavedBytes(chunk, data[0]["tokens"].shape[1])
    alive = []
    with quantized_step(system.chunks):
        with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor):
            for b in data:
                alive.append(
                    chunk(b["tokens"], b["position_ids"], b["attention_mask"], labels=b["labels"])
                )
        caches = [linear.weight_cache for linear in quantized_linears(chunk).values()]
        held = sum(cache.num_bytes for cache in caches if cache is not None)
    for handle in saved.handles:
        handle.remove()
    return {
        "linear_saved_bytes": saved.bytes_of(saved.by_linears),
        "saved_bytes": saved.bytes_of(),
        # mqat keeps codes and masks in a cache for the step; peers save a copy per microbatch.
        "extra_bytes_per_param": (held or saved.bytes_of(saved.of_weights)) / saved.num_weights,
    }


def timed(
    baseline: System, system: System, data: list[dict[str, Any]], repeats: int
) -> dict[str, Any]:
    """Steps of both in turns; the first round warms up. CPU seconds are less disturbed than wall."""
    seconds: list[list[float]] = [[], []]
    ratios: list[float] = []
    for repeat in range(repeats + 1):
        busy = []
        for i, each in enumerate((baseline, system)):
            began, began_cpu = time.perf_counter(), time.process_time()
            step(each, data)
            busy.append(time.process_time() - began_cpu)
            if repeat:
                seconds[i].append(time.perf_counter() - began)
        if repeat:
            ratios.append(busy[1] / busy[0])
    first, second = (statistics.median(values) for values in seconds)
    return {
        "step_seconds": second,
        "step_ratio": second / first,
        "step_cpu_ratio": statistics.median(ratios),
        "step_cpu_ratio_range": [round(min(ratios), 4), round(max(ratios), 4)],
    }


def measure(args: argparse.Namespace, name: str, algorithm: str) -> dict[str, Any]:
    """The row of one system."""
    start(args)
    data = batches(args)
    baseline = build(args, "baseline", "null")
    system = (build if name == "mqat" else build_peer)(args, name, algorithm)
    plain, row = memory(baseline, data), memory(system, data)
    found = {
        "system": name,
        "algorithm": algorithm,
        "precision": args.precision,
        "tokens_per_microbatch": args.tokens,
        "microbatches": args.microbatches,
        "hidden": args.hidden,
        "layers": args.layers,
        "tp": args.tp,
        **timed(baseline, system, data, args.repeats),
        "linear_saved_ratio": row["linear_saved_bytes"] / plain["linear_saved_bytes"],
        "saved_ratio": row["saved_bytes"] / plain["saved_bytes"],
        **row,
    }
    groups.finalize()
    return found


def main() -> None:
    """Prints a table, or JSON."""
    parser = arguments(__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--one", nargs=2, metavar=("SYSTEM", "ALGORITHM"))
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args, *args.one)))
        return
    results: list[dict[str, Any]] = []
    for name, algorithm in [*(("mqat", a) for a in args.algorithms), *available()]:
        command = [sys.executable, __file__, *sys.argv[1:], "--one", name, algorithm]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{name} {algorithm}: {done.stderr}")
        row = json.loads(done.stdout.splitlines()[-1])
        results.append(row)
        if not args.json:
            print(
                f"{name:>9} {algorithm:>14}  {row['step_seconds']:7.3f} s"
                f"  x{row['step_cpu_ratio']:.3f} CPU {row['step_cpu_ratio_range']}"
                f"  linears x{row['linear_saved_ratio']:.2f}  all x{row['saved_ratio']:.2f}"
                f"  {row['extra_bytes_per_param']:.2f} B/parameter",
                flush=True,
            )
    if args.json:
        print(json.dumps({"results": results}, indent=1))


if __name__ == "__main__":
    main()

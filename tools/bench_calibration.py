"""Time of calibration against plain forward passes over the same tokens.

    python tools/bench_calibration.py --tokens 256 --microbatches 4 --json
    python tools/bench_calibration.py --awq --json

The second compares AWQ (`int4_awq`) on SmolLM2-135M in float32 with nvidia-modelopt's `INT4_AWQ_CFG` on
the same model in transformers, the same sequences, threads and process, in turns.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from bench_model import arguments, batches, build, calibrate_on, start

from mqat.checkpoints.source import open_pretrained
from mqat.config import DataConfig, ModelConfig
from mqat.data.dataset import load_run_data
from mqat.data.loader import Microbatch
from mqat.data.packaged import smollm2_gguf
from mqat.runtime import groups
from mqat.specs.policy import Policy

Steps = Sequence[Sequence[Microbatch]]


def _mqat_awq(source: Any, steps: Steps) -> float:
    """CPU seconds from the built model to frozen scales."""
    from megatron.core import parallel_state

    from mqat.calibration.calibrate import calibrate
    from mqat.calibration.weight_recipe import apply_weight_recipe_
    from mqat.checkpoints.pretrained import load_pretrained_
    from mqat.evaluation.forward import run_layers
    from mqat.specs.model import build_model

    algorithms = Policy("int4_awq").resolve(source.config)
    layers: dict[str, Any] = {name: algorithm.scheme for name, algorithm in algorithms.items()}
    chunks = list(build_model(source.config, ModelConfig(), layers, torch.float32))
    load_pretrained_(chunks, source)
    group = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
    dp_group = parallel_state.get_data_parallel_group(with_context_parallel=True)

    def run() -> None:
        run_layers(chunks, steps)

    began = time.process_time()
    recipes = {name: algorithm.recipe for name, algorithm in algorithms.items()}
    qparams, _ = apply_weight_recipe_(
        chunks, run, recipes, model=source.config, group=group, dp_group=dp_group
    )
    calibrate(chunks, run, group=group, weight_qparams=qparams)
    return time.process_time() - began


def _modelopt_awq(path: Path, steps: Steps) -> float:
    """CPU seconds of `mtq.quantize`."""
    from quality_peers import load_model, quantize_

    model = load_model(path, torch.float32)
    began = time.process_time()
    quantize_(model, "int4_awq", steps)
    return time.process_time() - began


def compare_awq(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each system."""
    from quality_peers import batches as microbatches

    path = smollm2_gguf()
    source = open_pretrained(path)
    data = load_run_data(
        DataConfig(packaged="wikipedia", seq_length=512),
        model=source.config, source=source.tokenizer_source, checkpoint=None,
    )  # fmt: skip
    steps = microbatches(data.train, 4).spread(args.sequences)
    systems = [("mqat", lambda: _mqat_awq(source, steps))]
    if importlib.util.find_spec("modelopt") is None:
        print("modelopt is not installed (pip install 'mqat[bench]'): no row", file=sys.stderr)
    else:
        systems.append(("modelopt", lambda: _modelopt_awq(path, steps)))
    seconds: dict[str, list[float]] = {name: [] for name, _ in systems}
    for _ in range(args.repeats):
        for name, run in systems:
            seconds[name].append(run())
            gc.collect()
    return [
        {
            "system": name,
            "algorithm": "int4_awq",
            "tokens": args.sequences * 512,
            "calibration_cpu_seconds": statistics.median(found),
            "calibration_cpu_seconds_range": [round(min(found), 2), round(max(found), 2)],
            "ratio_to_mqat": statistics.median(found) / statistics.median(seconds["mqat"]),
        }
        for name, found in seconds.items()
    ]


def main() -> None:
    """Prints a table, or JSON."""
    parser = arguments(__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--awq", action="store_true", help="beside nvidia-modelopt's AWQ")
    parser.add_argument("--sequences", type=int, default=16, help="of 512 tokens, with --awq")
    args = parser.parse_args()
    start(args)
    if args.awq:
        print(json.dumps({"results": compare_awq(args)}, indent=1))
        groups.finalize()
        return
    from mqat.evaluation.forward import evaluate

    plain = build(args, "mqat", "null")
    data = batches(args)
    results = []
    for algorithm in args.algorithms:
        system = build(args, "mqat", algorithm)
        forward: list[float] = []
        calibration: list[float] = []
        for _ in range(args.repeats + 1):
            began = time.process_time()
            evaluate(plain.chunks, [data])
            middle = time.process_time()
            calibrate_on(system.chunks, data)
            forward.append(middle - began)
            calibration.append(time.process_time() - middle)
        ratios = [b / a for a, b in zip(forward[1:], calibration[1:], strict=True)]
        results.append(
            {
                "system": "mqat",
                "algorithm": algorithm,
                "precision": args.precision,
                "tokens": args.tokens * args.microbatches,
                "tp": args.tp,
                "forward_cpu_seconds": statistics.median(forward[1:]),
                "calibration_cpu_ratio": statistics.median(ratios),
                "calibration_cpu_ratio_range": [round(min(ratios), 4), round(max(ratios), 4)],
            }
        )
    if groups.is_main():
        if args.json:
            print(json.dumps({"results": results}, indent=1))
        else:
            for row in results:
                print(
                    f"{row['algorithm']:>14}  x{row['calibration_cpu_ratio']:.3f} CPU of a forward"
                    f"  {row['calibration_cpu_ratio_range']}"
                )
    groups.finalize()


if __name__ == "__main__":
    main()

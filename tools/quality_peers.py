"""Held-out perplexity of nvidia-modelopt's algorithms on the tokens that mqat's table uses.

python tools/quality_peers.py [--model DIR|GGUF] [--algorithms null int8 ...] --out peers.json

Same model in bfloat16, same calibration sequences and same held-out tokens as tools/quality_table.py;
the model runs in transformers. The file is rewritten after every algorithm, and algorithms that it
holds already are not measured again. Needs nvidia-modelopt (`pip install mqat[bench]`).
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from transformers import AutoModelForCausalLM

from mqat.checkpoints.source import open_pretrained
from mqat.config import DataConfig
from mqat.data.dataset import load_run_data
from mqat.data.loader import Batches, Microbatch
from mqat.data.packaged import smollm2_gguf
from mqat.data.packing import PackedDataset

# mqat's name of the nearest scheme -> modelopt's configuration; its lists leave out lm_head.
CONFIGS = {
    "int8": "INT8_DEFAULT_CFG",
    "int8_sq": "INT8_SMOOTHQUANT_CFG",
    "int8_wo": "INT8_WEIGHT_ONLY_CFG",
    "fp8": "FP8_DEFAULT_CFG",
    "fp8_pc_pt": "FP8_PER_CHANNEL_PER_TOKEN_CFG",
    "int4": "INT4_BLOCKWISE_WEIGHT_ONLY_CFG",
    "int4_awq": "INT4_AWQ_CFG",
    "w4a8_awq": "W4A8_AWQ_BETA_CFG",
    "mxfp4": "MXFP4_DEFAULT_CFG",
    "mxfp8": "MXFP8_DEFAULT_CFG",
    "nvfp4": "NVFP4_DEFAULT_CFG",
}
Steps = Sequence[Sequence[Microbatch]]


def load_model(path: Path, dtype: torch.dtype) -> Any:
    """The model in transformers, from a directory or a GGUF file."""
    settings: dict[str, Any] = {"dtype": dtype, "attn_implementation": "sdpa"}
    if path.is_file():
        return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, **settings)
    return AutoModelForCausalLM.from_pretrained(path, **settings)


def batches(data: PackedDataset, micro_batch_size: int) -> Batches:
    """In file order, one process."""
    return Batches(
        data,
        global_batch_size=micro_batch_size,
        micro_batch_size=micro_batch_size,
        dp_rank=0,
        dp_size=1,
        shuffle=False,
        seed=0,
    )


@torch.no_grad()
def perplexity(model: Any, steps: Steps) -> float:
    """Exponential of the mean loss per counted token."""
    loss = count = 0.0
    for microbatch in (batch for step in steps for batch in step):
        tokens, labels, mask = (microbatch[key] for key in ("tokens", "labels", "loss_mask"))
        assert tokens is not None and labels is not None and mask is not None
        logits = model(tokens, use_cache=False).logits.float()
        losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        loss += float((losses * mask.flatten()).double().sum())
        count += float(mask.sum())
    return math.exp(loss / count)


def quantize_(model: Any, algorithm: str, steps: Steps, stretch: float = 1.0) -> tuple[Any, int]:
    """The model after modelopt's calibration, and how many of its quantizers are switched on.

    `stretch` multiplies the largest weight afterwards: another grid, as good for a float format.
    """
    import modelopt.torch.quantization as mtq
    from modelopt.torch.quantization.nn import TensorQuantizer

    @torch.no_grad()
    def forward_loop(model: Any) -> None:
        for microbatch in (batch for step in steps for batch in step):
            model(microbatch["tokens"], use_cache=False)

    model = mtq.quantize(model, getattr(mtq, CONFIGS[algorithm]), forward_loop)
    for linear in model.modules():
        quantizer = getattr(linear, "weight_quantizer", None)
        if stretch != 1 and quantizer is not None and quantizer.is_enabled:
            quantizer.amax = quantizer.amax * stretch
    quantizers = [m for m in model.modules() if isinstance(m, TensorQuantizer)]
    return model, sum(quantizer.is_enabled for quantizer in quantizers)


def measure(
    model: Any, algorithm: str, calibration: Steps, evaluation: Steps, stretch: float = 1.0
) -> dict[str, Any]:
    """One line of the table; what cannot run here says why."""
    row: dict[str, Any] = {}
    started = time.perf_counter()
    try:
        if algorithm != "null":
            row["config"] = CONFIGS[algorithm]
            model, row["quantizers"] = quantize_(model, algorithm, calibration, stretch)
            row["calibration_seconds"] = round(time.perf_counter() - started, 2)
        evaluated = time.perf_counter()
        row["ppl"] = perplexity(model, evaluation)
        row["evaluation_seconds"] = round(time.perf_counter() - evaluated, 2)
    except (RuntimeError, NotImplementedError, AssertionError, ImportError, TypeError) as error:
        reason = next(iter(str(error).strip().splitlines()), "")[:200]
        return row | {"ppl": None, "error": f"{type(error).__name__}: {reason}"}
    row["peak_gb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
    return row


def main() -> None:
    """Writes {algorithm: {ppl, calibration_seconds, ...}} and prints a line for each."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, help="default: the packaged SmolLM2-135M")
    parser.add_argument("--algorithms", nargs="+", choices=["null", *CONFIGS],
                        default=["null", *CONFIGS])  # fmt: skip
    parser.add_argument("--calibration", type=int, default=16, help="sequences")
    parser.add_argument("--evaluation", type=int, default=32, help="sequences")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--seq-length", type=int, default=512)
    parser.add_argument("--micro-batch-size", type=int, default=4)
    parser.add_argument("--stretch", type=float, default=1.0, help="factor of weights' amax")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    path = args.model or smollm2_gguf()
    source = open_pretrained(path)
    data = load_run_data(
        DataConfig(packaged="wikipedia", seq_length=args.seq_length),
        model=source.config, source=source.tokenizer_source, checkpoint=None,
    )  # fmt: skip
    calibration = batches(data.train, args.micro_batch_size).spread(args.calibration)
    evaluation = batches(data.validation, args.micro_batch_size).spread(args.evaluation)
    results = json.loads(args.out.read_text("utf-8")) if args.out.exists() else {}
    for algorithm in args.algorithms:
        if algorithm in results:
            continue
        model = load_model(path, getattr(torch, args.dtype))
        results[algorithm] = measure(model, algorithm, calibration, evaluation, args.stretch)
        args.out.write_text(json.dumps(results, indent=2) + "\n", "utf-8")
        print(algorithm, json.dumps(results[algorithm]), flush=True)


if __name__ == "__main__":
    main()

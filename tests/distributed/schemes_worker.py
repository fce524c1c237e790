"""Run by torchrun: calibrates, trains and resumes a tiny model with one algorithm after another."""

import argparse
import dataclasses
import json
from contextlib import contextmanager
from pathlib import Path

import torch

from mqat.checkpoints.random_weights import RandomWeights
from mqat.config import ModelConfig, OptimizerConfig
from mqat.runtime import groups
from mqat.specs.policy import Policy, Rule
from tests.distributed.worker import MODEL

SMALL = dataclasses.replace(MODEL, num_layers=2)
# What no named algorithm has: squares, static and dynamic outputs, symmetric INT8 tokens, and static
# inputs and outputs with zero points.
UINT8 = {"format": "uint8", "granularity": "tensor", "asymmetric": True}
TOKEN = {"format": "fp8_e4m3", "granularity": "token", "dynamic": True}
COMPOSED = (
    Rule(
        "*.mlp.linear_fc1",
        operands={"weight": {"format": "fp8_e4m3", "granularity": "block:32"}, "output": TOKEN},
    ),
    Rule(
        "*.linear_proj",
        operands={
            "weight": {"format": "int3", "granularity": "group:16"},
            "input": {"format": "int8_full", "granularity": "token", "dynamic": True},
            "output": {"format": "int8_full", "granularity": "tensor"},
        },
    ),
    Rule(
        "*.linear_fc2",
        operands={
            "weight": {"format": "int8", "granularity": "channel"},
            "input": UINT8,
            "output": UINT8,
        },
    ),
    Rule("*", operands={"weight": {"format": "int8", "granularity": "block:32"}, "input": TOKEN}),
)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("algorithms", nargs="+")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--pp", type=int, default=1)
    parser.add_argument("--sp", action="store_true")
    parser.add_argument("--guard", action="store_true", help="count levels of weights; TP 1 only")
    return parser.parse_args()


def multiplied_weight(linear) -> torch.Tensor:
    """What the forward GEMM really uses: the image of the identity, without activation quantizers."""
    others = [q for kind, q in linear.quantizers.items() if kind != "weight"]
    for quantizer in others:
        quantizer.is_enabled = False
    width = linear.weight.shape[1]
    with torch.no_grad():
        output, _ = linear(torch.eye(width)[:, None])
    for quantizer in others:
        quantizer.is_enabled = True
    return output[:, 0].t()


def count_levels(values: torch.Tensor, quantizer) -> int:
    """Distinct values over a whole weight, in units of each element's own scale."""
    shape = tuple(values.shape)
    spread = quantizer.scheme.granularity.expand
    ratio = values / spread(quantizer.qparams(values)[0], shape)
    if quantizer.zero_point is not None:
        ratio = ratio + spread(quantizer.zero_point, shape)
    return int((ratio * 4096).round().unique().numel())  # E4M3's smallest step is 1/512


def most_levels(chunks, *, raw: bool = False) -> int:
    """Of any linear of the model; with `raw`, of the weights themselves."""
    from mqat.parallel.linear import quantized_linears

    return max(
        count_levels(linear.weight.detach() if raw else multiplied_weight(linear), quantizer)
        for linear in quantized_linears(chunks).values()
        if (quantizer := linear.weight_quantizer) is not None
    )


@contextmanager
def unmerged(chunks):
    """Tokens scaled by the maxima of this rank's own features; a control."""
    from mqat.parallel.linear import quantized_linears

    merged = [
        q
        for x in quantized_linears(chunks).values()
        for q in x.quantizers.values()
        if q.reduce_amax
    ]
    kept = [quantizer.reduce_amax for quantizer in merged]
    for quantizer in merged:
        quantizer.reduce_amax = None
    yield
    for quantizer, merge_ in zip(merged, kept, strict=True):
        quantizer.reduce_amax = merge_


def microbatches(rank: int, size: int) -> list[dict]:
    tokens = torch.randint(0, 301, (4, 2, 33), generator=torch.Generator().manual_seed(0))
    return [
        {
            "tokens": t[:, :-1].contiguous(), "labels": t[:, 1:].contiguous(),
            "loss_mask": torch.ones(2, 32), "position_ids": torch.arange(32).expand(2, 32),
            "attention_mask": None,
        }
        for t in tokens
    ][rank::size]  # fmt: skip


def run(algorithm: str, out: Path, args: argparse.Namespace) -> dict:
    from megatron.core import parallel_state

    from mqat.calibration.calibrate import calibrate
    from mqat.checkpoints.dist_checkpoint import TrainingState, load_checkpoint, save_checkpoint
    from mqat.checkpoints.pretrained import load_pretrained_
    from mqat.evaluation.forward import evaluate
    from mqat.specs.model import build_model
    from mqat.training.optimizer import build_optimizer, wrap_for_training
    from mqat.training.step import forward_backward

    is_composed = algorithm == "composed"
    policy = Policy("null", 32, COMPOSED) if is_composed else Policy(algorithm, 32)
    layers = policy.schemes(SMALL)
    settings = ModelConfig(
        tensor_model_parallel_size=args.tp, pipeline_model_parallel_size=args.pp,
        sequence_parallel=args.sp,
    )  # fmt: skip
    chunks = build_model(SMALL, settings, layers, torch.float32)
    load_pretrained_(chunks, RandomWeights(SMALL, 1, 0.1))
    chunks = wrap_for_training(chunks)
    batches = microbatches(
        parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    )
    group = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
    result = {"unquantized": evaluate(chunks, [batches])[0]}
    calibrate(chunks, lambda: evaluate(chunks, [batches]), group=group)
    result["quantized"] = evaluate(chunks, [batches])[0]
    with unmerged(chunks):
        result["unmerged"] = evaluate(chunks, [batches])[0]
    save_checkpoint(out / "ptq", chunks, model=SMALL, layers=layers, algorithm=algorithm)
    levels = [most_levels(chunks)] if args.guard else []
    optimizer, scheduler = build_optimizer(
        chunks, OptimizerConfig(lr=1e-3), max_steps=10, clip_grad=1.0
    )
    state = TrainingState(optimizer, scheduler)

    def step() -> float:
        for chunk in chunks:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        sums = forward_backward(chunks, batches)
        loss, count = sums["loss"], sums["tokens"]
        optimizer.step()
        scheduler.step(increment=1)
        return loss / count

    result["losses"] = [step(), step()]
    if args.guard:
        levels.append(most_levels(chunks))
        save_checkpoint(
            out / "qat", chunks, model=SMALL, layers=layers, algorithm=algorithm, training=state
        )
        ahead = [step(), step()]
        load_checkpoint(out / "qat", chunks, layers=layers, training=state)
        levels.append(most_levels(chunks))
        result["resumed_alike"] = [step(), step()] == ahead
        result["levels"] = levels
        result["raw_levels"] = most_levels(chunks, raw=True)
    return result


def main() -> None:
    args = parse()
    groups.initialize(tensor_parallel=args.tp, pipeline_parallel=args.pp)
    results = {name: run(name, args.out / name, args) for name in args.algorithms}
    if groups.is_main():
        (args.out / "result.json").write_text(json.dumps(results))
    groups.finalize()


if __name__ == "__main__":
    main()

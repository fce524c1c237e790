"""Run by torchrun: trains scales (and fewer bits, step by step) of a tiny model, once for each job.

The argument is a JSON file with a list of jobs, as for worker.py.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from mqat.checkpoints.random_weights import RandomWeights
from mqat.config import ModelConfig, OptimizerConfig, QuantizationConfig
from mqat.runtime import groups
from mqat.specs.policy import Policy, Rule
from tests.distributed.schemes_worker import SMALL, microbatches, most_levels

INPUT = {"format": "int8_full", "granularity": "tensor"}
# Every row of the table in parallel/learned_scales.py, on both grids of scales.
RULES = {
    "linear_qkv": {"format": "int4", "granularity": "tensor"},
    "linear_proj": {"format": "int4", "granularity": "channel", "scale": "bfloat16"},
    "linear_fc1": {"format": "int2_elastic", "granularity": "group:32"},
    "linear_fc2": {"format": "int4", "granularity": "tensor"},
}
INT4 = {name: {"format": "int4", "granularity": "group:32", "scale": "bfloat16"} for name in RULES}


def parse(options: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--pp", type=int, default=1)
    parser.add_argument("--sp", action="store_true")
    parser.add_argument("--recompute")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--inputs", default="lsq")
    parser.add_argument("--unsummed", action="store_true", help="control: no sum over TP")
    parser.add_argument("--bits", type=json.loads, default=[], help="bit schedule; INT4 weights")
    parser.add_argument("--resume", type=Path, help="training checkpoint of another layout")
    return parser.parse_args(options)


def whole_gradient(optimizer, parameter) -> torch.Tensor:
    """Gradient of a parameter, of which a data-parallel rank holds the part that it updates."""
    from megatron.core import parallel_state

    (distributed,) = optimizer.chained_optimizers
    whole = torch.zeros(parameter.numel(), device=parameter.device)
    if parameter in distributed.model_param_gbuf_map:
        own = distributed._get_model_param_range_map(parameter)["param"]
        whole[own.start : own.end] = parameter.main_grad.view(-1)[own.start : own.end]
    dist.all_reduce(whole, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    return whole.view_as(parameter)


def save_gradients(path: Path, chunks, optimizer) -> None:
    """Gradients of all learned scales, each as one global tensor."""
    from megatron.core import dist_checkpointing, parallel_state

    from mqat.parallel.checkpoint import learned_sharded_state

    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    state = learned_sharded_state(chunks, dp_group=group)
    gradients = {
        key: dataclasses.replace(entry, data=whole_gradient(optimizer, entry.data))
        for key, entry in state.items()
    }
    path.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    dist_checkpointing.save(gradients, str(path))


def run(args: argparse.Namespace) -> None:
    groups.initialize(tensor_parallel=args.tp, pipeline_parallel=args.pp)
    from megatron.core import parallel_state

    from mqat.calibration.calibrate import calibrate
    from mqat.checkpoints.dist_checkpoint import TrainingState, load_checkpoint, save_checkpoint
    from mqat.checkpoints.pretrained import load_pretrained_
    from mqat.evaluation.forward import evaluate
    from mqat.parallel.learned_scales import learn_scales_
    from mqat.parallel.linear import quantized_linears
    from mqat.specs.model import build_model
    from mqat.training.optimizer import build_optimizer, wrap_for_training
    from mqat.training.schedule import QuantizerSchedule
    from mqat.training.step import forward_backward

    rules = [
        Rule(f"*.{name}", operands={"weight": weight, "input": INPUT})
        for name, weight in (INT4 if args.bits else RULES).items()
    ]
    layers = Policy("null", rules=rules).schemes(SMALL)
    settings = ModelConfig(
        tensor_model_parallel_size=args.tp, pipeline_model_parallel_size=args.pp,
        sequence_parallel=args.sp, activations_checkpoint_granularity=args.recompute,
    )  # fmt: skip
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    built = build_model(SMALL, settings, layers, dtype)
    learn_scales_(built, weights="lsq", inputs=args.inputs)
    # A seed for which sums in another order flip no code: gradients of scales would jump with it.
    load_pretrained_(built, RandomWeights(SMALL, 2, 0.1))
    chunks = wrap_for_training(built)
    quantizers = [q for x in quantized_linears(chunks).values() for q in x.quantizers.values()]
    if args.unsummed:
        for quantizer in quantizers:
            quantizer.scale.average_gradients_across_tp_domain = False
    batches = microbatches(
        parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    )
    group = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
    calibrate(chunks, lambda: evaluate(chunks, [batches]), group=group)
    for quantizer in quantizers:
        quantizer.load_({"scale": quantizer.scale.detach() * 0.6})  # some elements are clipped
    result: dict = {"quantized": evaluate(chunks, [batches])[0], "levels": []}
    optimizer, scheduler = build_optimizer(
        chunks, OptimizerConfig(lr=1e-3), max_steps=10, clip_grad=1.0,
        scales=QuantizationConfig(lsq_lr=1e-4, pact_a_lr=1e-2, pact_a_decay=0.1),
    )  # fmt: skip
    state = TrainingState(optimizer, scheduler)
    schedule = QuantizerSchedule(bits=args.bits)
    alone = dist.get_world_size() == 1

    def step() -> float:
        schedule.apply_(chunks, state.step)
        for chunk in chunks:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        sums = forward_backward(chunks, batches)
        loss, count = sums["loss"], sums["tokens"]
        if state.step == 0:
            save_gradients(args.out / "gradients", chunks, optimizer)
        if alone:
            result["levels"].append(most_levels(chunks))
        _, norm, _ = optimizer.step()
        scheduler.step(increment=1)
        state.step += 1
        result.setdefault("grad_norms", []).append(float(norm))
        return loss / count

    def save(name: str, training: TrainingState | None = None) -> None:
        save_checkpoint(args.out / name, chunks, model=SMALL, layers=layers, algorithm="custom",
                        training=training)  # fmt: skip

    if args.resume:
        load_checkpoint(args.resume, chunks, layers=layers, training=state)
    save("ptq")
    result["losses"] = [step(), step()]
    save("qat", state)
    result["ahead"] = [step(), step()]
    raw = [quantizer.scale.detach().clone() for quantizer in quantizers]
    save("ahead")
    load_checkpoint(args.out / "qat", chunks, layers=layers, training=state)
    again = [step(), step()]
    result["resumed_alike"] = again == result["ahead"] and all(
        torch.equal(q.scale, before) for q, before in zip(quantizers, raw, strict=True)
    )
    groups_of = [g for g in optimizer.param_groups if g["is_decoupled_lr"]]
    result["groups"] = [[g["max_lr"], g["weight_decay"], g["wd_mult"]] for g in groups_of]
    if groups.is_main():
        (args.out / "result.json").write_text(json.dumps(result))
    parallel_state.destroy_model_parallel()


def main() -> None:
    for job in json.loads(Path(sys.argv[1]).read_text("utf-8")):
        run(parse(job))
    groups.finalize()


if __name__ == "__main__":
    main()

"""Run by torchrun: calibrates, trains two steps and saves a tiny model, once for each job.

The argument is a JSON file with a list of jobs, each a list of options. Importing Megatron-Core takes
longer than a job, so all jobs of one world size share the processes; each has groups of its own.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mqat.checkpoints.random_weights import RandomWeights
from mqat.config import ModelConfig, OptimizerConfig, QuantizationConfig
from mqat.data.packing import document_ends
from mqat.models.adapters import Adapters
from mqat.models.decoder import DecoderConfig
from mqat.models.schemes import linear_schemes
from mqat.models.structure import DENSE_LINEARS, in_layer
from mqat.runtime import groups
from mqat.specs.policy import Policy, Rule

LINEARS = tuple(linear.name for linear in DENSE_LINEARS)

MODEL = DecoderConfig(
    vocab_size=301, hidden_size=128, intermediate_size=256, num_layers=4,
    num_attention_heads=4, num_query_groups=2, head_dim=32, tie_word_embeddings=True,
)  # fmt: skip
# Of another family, with biases; fits tensor-parallel sizes 1, 2, 3 and 6.
QWEN2 = DecoderConfig(
    vocab_size=301, hidden_size=192, intermediate_size=384, num_layers=4,
    num_attention_heads=6, num_query_groups=6, head_dim=32, tie_word_embeddings=True,
    family="qwen2", biases=LINEARS[:1],
)  # fmt: skip
BIASED = dataclasses.replace(MODEL, biases=LINEARS)
# Experts narrower than their description's MLP.
EXPERTS = DecoderConfig(
    vocab_size=301, hidden_size=128, intermediate_size=256, num_layers=2, num_attention_heads=4,
    num_query_groups=2, head_dim=32, tie_word_embeddings=True, family="qwen3_moe", num_experts=4,
    experts_per_token=2, expert_intermediate_size=64, normalizes_expert_weights=False,
)  # fmt: skip
MIXTRAL = dataclasses.replace(
    EXPERTS, family="mixtral", normalizes_expert_weights=True, intermediate_size=64
)
# A shared expert behind a gate, and biases.
SHARED = dataclasses.replace(
    EXPERTS, family="qwen2_moe", shared_intermediate_size=128, biases=LINEARS[:1]
)
# A corrected choice from groups, shared experts, and a first layer without experts.
CORRECTED = dataclasses.replace(
    EXPERTS, family="glm4_moe", num_layers=4, shared_intermediate_size=128, dense_layers=(0,),
    rotary_fraction=0.5, normalizes_expert_weights=True, expert_weight_scale=1.5, expert_groups=2,
)  # fmt: skip
MODELS = {
    "llama": MODEL, "biased": BIASED, "qwen2": QWEN2, "experts": EXPERTS, "mixtral": MIXTRAL,
    "shared": SHARED, "corrected": CORRECTED,
}  # fmt: skip
TABLES = (
    Rule("embedding.word_embeddings", "int4"),
    Rule(
        "output_layer",
        operands={
            "weight": {"format": "int8", "granularity": "channel"},
            "input": {"format": "int8_full", "granularity": "tensor"},
        },
    ),
)
TOKENS = torch.randint(0, 301, (2, 40), generator=torch.Generator().manual_seed(2))

# Documents end within chunks of 32 tokens over 2 and 4 ranks, and reach over several.
SEGMENTS = torch.tensor([[0] * 3 + [1] * 18 + [2] * 6 + [-1] * 5, [0] * 32])


def main() -> None:
    for job in json.loads(Path(sys.argv[1]).read_text("utf-8")):
        run(parse(job))
    groups.finalize()


def parse(options: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--pp", type=int, default=1)
    parser.add_argument("--vp", type=int)
    parser.add_argument("--sp", action="store_true")
    parser.add_argument("--cp", type=int, default=1)
    parser.add_argument("--ep", type=int, default=1)
    parser.add_argument("--etp", type=int)
    parser.add_argument("--idle", action="store_true", help="no token for expert 3 of layer 0")
    parser.add_argument("--contiguous", action="store_true", help="chunks in file order: wrong")
    parser.add_argument("--recompute")
    parser.add_argument("--ddp", type=json.loads, default={}, help="Megatron's DDP options")
    parser.add_argument("--documents", action="store_true", help="several in each sequence")
    parser.add_argument("--algorithm", default="int8")
    parser.add_argument("--model", choices=MODELS, default="llama")
    parser.add_argument("--ptq", action="store_true", help="save the calibrated model and stop")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--untied", action="store_true")
    parser.add_argument("--tables", action="store_true", help="quantize embedding and output layer")
    parser.add_argument("--backward", default="bf16")
    parser.add_argument("--learned", action="store_true", help="scales of weights and inputs")
    parser.add_argument("--kv-cache")
    parser.add_argument("--kv-cache-scales", default="shared")
    parser.add_argument(
        "--unreduced", action="store_true", help="each rank's own statistics: wrong"
    )
    parser.add_argument("--logits", action="store_true", help="save those of the trained model")
    parser.add_argument(
        "--distill", type=json.loads, help="of `DistillationLoss`, and hidden_weight"
    )
    parser.add_argument("--lora", type=json.loads, help="of `Adapters`; names are patterns")
    parser.add_argument("--packed", action="store_true", help="weights under the adapters")
    parser.add_argument("--resume", type=Path, help="training checkpoint of another layout")
    return parser.parse_args(options)


def finish(args: argparse.Namespace, result: dict[str, Any]) -> None:
    from megatron.core import parallel_state

    if groups.is_main():
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "result.json").write_text(json.dumps(result))
    parallel_state.destroy_model_parallel()  # the next job has another layout of the same world


def avoid_an_expert(chunks: list[Any]) -> None:
    """Leaves the last expert of the first layer without tokens."""
    from mqat.parallel.quantized_module import unwrapped

    for layer in (layer for chunk in unwrapped(chunks) for layer in chunk.decoder.layers):
        if layer.layer_number == 1:
            router, away = layer.mlp.router, torch.tensor([0.0, 0.0, 0.0, -1e4])
            router.gating = lambda x, gating=router.gating, away=away: gating(x) + away


def adapters_for(model: DecoderConfig, keys: dict[str, Any]) -> Adapters:
    kinds = keys.pop("names", LINEARS)
    names = [in_layer(i, n) for i in range(model.num_layers) for n in LINEARS if n in kinds]
    return Adapters(tuple(names), **{"rank": 4, "alpha": 8.0} | keys)


def run(args: argparse.Namespace) -> None:
    model = dataclasses.replace(MODELS[args.model], tie_word_embeddings=not args.untied)
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    groups.initialize(
        tensor_parallel=args.tp, pipeline_parallel=args.pp, virtual_pipeline=args.vp,
        context_parallel=args.cp, expert_parallel=args.ep, expert_tensor_parallel=args.etp,
    )  # fmt: skip
    from megatron.core import parallel_state

    from mqat.calibration.calibrate import calibrate
    from mqat.checkpoints.dist_checkpoint import TrainingState, load_checkpoint, save_checkpoint
    from mqat.checkpoints.packed_backbone import load_packed_
    from mqat.checkpoints.pretrained import load_pretrained_
    from mqat.evaluation import forward
    from mqat.evaluation.forward import evaluate, logits, run_layers
    from mqat.evaluation.quality import quality_report
    from mqat.parallel.add_adapters import add_adapters_, merge_adapters_
    from mqat.parallel.divergence import DistillationLoss
    from mqat.parallel.learned_scales import learn_scales_
    from mqat.parallel.low_precision_backward import set_backward_
    from mqat.parallel.quantized_module import ExpertGroups, quantized_modules
    from mqat.specs.model import build_model, padded_vocab_size
    from mqat.training.distillation import Teacher
    from mqat.training.optimizer import build_optimizer, wrap_for_training
    from mqat.training.step import forward_backward

    policy = Policy(
        args.algorithm, 64, TABLES if args.tables else (), args.kv_cache, args.kv_cache_scales
    )
    layers = policy.schemes(model)
    settings = ModelConfig(
        tensor_model_parallel_size=args.tp, pipeline_model_parallel_size=args.pp,
        virtual_pipeline_model_parallel_size=args.vp, sequence_parallel=args.sp,
        context_parallel_size=args.cp, expert_model_parallel_size=args.ep,
        expert_tensor_parallel_size=args.etp, moe_aux_loss_coeff=0.01,
        activations_checkpoint_granularity=args.recompute,
    )  # fmt: skip
    chunks = build_model(model, settings, layers, dtype, is_packed=args.packed)
    load_pretrained_(chunks, RandomWeights(model, 1, 0.1))
    if args.packed:
        load_packed_(chunks, RandomWeights(model, 1, 0.1))
    if args.learned:
        learn_scales_(chunks, weights="lsq", inputs="lsq")
    set_backward_(chunks, args.backward)
    adapters = None
    if args.lora is not None:
        adapters = adapters_for(model, args.lora)
        add_adapters_(chunks, adapters)
    chunks = wrap_for_training(chunks, args.ddp)
    if args.idle:
        avoid_an_expert(chunks)
    if args.contiguous:
        forward.own_tokens = lambda x, group, dim=1: x.chunk(group.size(), dim)[group.rank()]
    ends = document_ends(SEGMENTS) if args.documents else None
    tokens = torch.randint(0, 301, (4, 2, 33), generator=torch.Generator().manual_seed(0))
    size, rank = (
        parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank(),
    )  # fmt: skip
    batches = [
        {
            "tokens": t[:, :-1].contiguous(), "labels": t[:, 1:].contiguous(),
            "loss_mask": torch.ones(2, 32), "position_ids": torch.arange(32).expand(2, 32),
            "attention_mask": ends,
        }
        for t in tokens
    ][rank::size]  # fmt: skip
    group = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
    if args.unreduced:
        group = [dist.new_group([r]) for r in range(dist.get_world_size())][dist.get_rank()]
    experts = [m for m in quantized_modules(chunks).values() if m.expert_groups is not None]
    sharing = [module.expert_groups for module in experts]
    if args.unreduced:
        for module in experts:
            module.expert_groups = ExpertGroups(group, group, module.expert_groups.ep)
    result = {"unquantized": evaluate(chunks, [batches])[0]}
    result["idle"] = calibrate(
        chunks, lambda: run_layers(chunks, [batches]), group=group, method="percentile"
    )
    for module, shared in zip(experts, sharing, strict=True):
        module.expert_groups = shared  # by which ranks know who saves
    result["quantized"] = evaluate(chunks, [batches])[0]
    if linear_schemes(layers) and not args.packed:
        result["quality"] = quality_report(
            chunks, lambda: run_layers(chunks, [batches]), group=group
        )["linears"]
    save_checkpoint(
        args.out / "ptq", chunks, model=model, layers=layers, algorithm=args.algorithm,
        adapters=adapters,
    )  # fmt: skip
    if args.ptq:
        finish(args, result)
        return
    optimizer, scheduler = build_optimizer(
        chunks, OptimizerConfig(lr=1e-3), max_steps=10, clip_grad=1.0,
        scales=QuantizationConfig(lsq_lr=1e-5),
    )  # fmt: skip
    state = TrainingState(optimizer, scheduler)
    if args.resume:  # before any step: a process that resumes has an optimizer without state
        load_checkpoint(args.resume, chunks, layers=layers, training=state, adapters=adapters)

    teacher = None
    if args.distill:
        other = dataclasses.replace(model, **args.distill.pop("model", {}))
        rows = padded_vocab_size(model)
        frozen = build_model(other, settings, {}, dtype, table_rows=rows)
        load_pretrained_(frozen, RandomWeights(other, 1, 0.1))
        hidden_weight = args.distill.pop("hidden_weight", 0.0)
        teacher = Teacher(frozen, DistillationLoss(**args.distill), hidden_weight=hidden_weight)

    def step() -> float:
        for chunk in chunks:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        sums = forward_backward(chunks, batches, step=state.step, teacher=teacher)
        loss, count = sums["loss"], sums["tokens"]
        state.step += 1
        _, norm, _ = optimizer.step()
        scheduler.step(increment=1)
        result.setdefault("grad_norms", []).append(float(norm))
        return loss / count

    result["bucket_groups"] = sum(len(chunk.bucket_groups) for chunk in chunks)
    result["losses"] = [step(), step()]  # after --resume: those that follow the checkpoint
    save_checkpoint(
        args.out / "qat", chunks, model=model, layers=layers, algorithm=args.algorithm,
        training=state, adapters=adapters,
    )  # fmt: skip
    if args.logits:
        trained = logits(chunks, TOKENS)
        if groups.is_main():
            torch.save(trained.cpu(), args.out / "logits.pt")
    result["ahead"] = [step(), step()]
    load_checkpoint(args.out / "qat", chunks, layers=layers, training=state, adapters=adapters)
    result["resumed_alike"] = [step(), step()] == result["ahead"]
    if adapters is not None and adapters.is_merged:
        result["beside"] = evaluate(chunks, [batches])[0]
        merge_adapters_(chunks)
        result["merged"] = evaluate(chunks, [batches])[0]
        save_checkpoint(
            args.out / "merged", chunks, model=model, layers=layers, algorithm=args.algorithm
        )
    finish(args, result)


if __name__ == "__main__":
    main()

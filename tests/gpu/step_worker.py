"""Run on one device: scales, loss, gradients and new weights of a step of a tiny quantized model."""

import sys
from pathlib import Path

import torch

from mqat.checkpoints.random_weights import RandomWeights
from mqat.config import ModelConfig, OptimizerConfig
from mqat.runtime import groups
from mqat.specs.policy import Policy
from tests.unit.model_fixtures import MODEL, microbatches


def main() -> None:
    out, algorithm = Path(sys.argv[1]), sys.argv[2]
    groups.initialize()
    from megatron.core import parallel_state

    from mqat.calibration.calibrate import calibrate
    from mqat.checkpoints.pretrained import load_pretrained_
    from mqat.evaluation.forward import evaluate
    from mqat.parallel.quantized_module import all_quantizers
    from mqat.specs.model import build_model
    from mqat.training.optimizer import build_optimizer, wrap_for_training
    from mqat.training.step import forward_backward

    layers = Policy(algorithm, group_size=64).schemes(MODEL)
    chunks = build_model(MODEL, ModelConfig(), layers, torch.float32)
    load_pretrained_(chunks, RandomWeights(MODEL, 1, 0.1))
    chunks = wrap_for_training(chunks)
    group = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
    calibrate(chunks, lambda: evaluate(chunks, [microbatches()]), group=group)
    optimizer, _ = build_optimizer(chunks, OptimizerConfig(lr=1e-3), max_steps=2, clip_grad=1.0)
    sums = forward_backward(chunks, microbatches())
    loss, tokens = sums["loss"], sums["tokens"]
    named = dict(chunks[0].named_parameters())
    gradients = {name: p.main_grad.float().cpu().clone() for name, p in named.items()}
    optimizer.step()
    result = {
        "device": groups.device().type,
        "loss": loss / tokens,
        "gradients": gradients,
        "weights": {name: p.detach().float().cpu() for name, p in named.items()},
        "scales": {q.name: q.scale.detach().cpu() for q in all_quantizers(chunks)},
    }
    torch.save(result, out)
    groups.finalize()


if __name__ == "__main__":
    main()

"""Run by torchrun: histograms of a tiny model's gradients, on each layout of its processes."""

import argparse
import json
from pathlib import Path

import torch

from mqat.checkpoints.random_weights import RandomWeights
from mqat.config import ModelConfig, OptimizerConfig
from mqat.runtime import groups
from tests.distributed.schemes_worker import SMALL, microbatches


def histograms(tp: int, pp: int, sp: bool) -> dict[str, list[int]]:
    groups.initialize(tensor_parallel=tp, pipeline_parallel=pp)
    from megatron.core import parallel_state

    from mqat.checkpoints.pretrained import load_pretrained_
    from mqat.specs.model import build_model
    from mqat.training.histograms import gradient_histograms
    from mqat.training.optimizer import build_optimizer, prepare_gradients, wrap_for_training
    from mqat.training.step import forward_backward

    settings = ModelConfig(
        tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, sequence_parallel=sp
    )
    built = build_model(SMALL, settings, {}, torch.float32)
    load_pretrained_(built, RandomWeights(SMALL, 2, 0.1))
    chunks = wrap_for_training(built)
    optimizer, _ = build_optimizer(chunks, OptimizerConfig(), max_steps=4, clip_grad=1.0)
    ranks = (
        parallel_state.get_data_parallel_rank(),
        parallel_state.get_data_parallel_world_size(),
    )
    forward_backward(chunks, microbatches(*ranks))
    prepare_gradients(optimizer)
    found = gradient_histograms(chunks, optimizer)
    parallel_state.destroy_model_parallel()
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("layouts", type=json.loads)
    args = parser.parse_args()
    found = {name: histograms(*layout) for name, layout in args.layouts.items()}
    if groups.is_main():
        args.out.write_text(json.dumps(found))
    groups.finalize()


if __name__ == "__main__":
    main()

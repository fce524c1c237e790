"""Run by torchrun: gradients that pass through a lowered NF4 backbone, on one layout."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from mqat.checkpoints.random_weights import RandomWeights
from mqat.config import ModelConfig
from mqat.runtime import groups
from mqat.specs.policy import Policy
from tests.distributed.worker import MODEL


def main() -> None:
    out, is_sequence_parallel = Path(sys.argv[1]), "--sp" in sys.argv
    tensor_parallel = int(sys.argv[2])
    groups.initialize(tensor_parallel=tensor_parallel)
    from megatron.core import parallel_state

    from mqat.calibration.calibrate import calibrate
    from mqat.checkpoints.pretrained import load_pretrained_
    from mqat.parallel.pack_weights import pack_weights_
    from mqat.specs.model import build_model

    settings = ModelConfig(
        tensor_model_parallel_size=tensor_parallel, sequence_parallel=is_sequence_parallel
    )
    chunks = build_model(MODEL, settings, Policy("nf4").schemes(MODEL), torch.float32)
    load_pretrained_(chunks, RandomWeights(MODEL, 1, 0.1))
    group = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
    calibrate(chunks, lambda: None, group=group)
    pack_weights_(chunks)
    tokens = torch.randint(0, 301, (2, 33), generator=torch.Generator().manual_seed(0))
    tokens = tokens.to(groups.device())
    positions = torch.arange(32, device=tokens.device).expand(2, 32)
    loss = chunks[0](tokens[:, :-1], positions, None, labels=tokens[:, 1:].contiguous())
    loss.mean().backward()
    gradients = {}
    for name, parameter in chunks[0].named_parameters():
        if "norm" in name:
            if is_sequence_parallel:  # each rank has seen its share of the tokens
                dist.all_reduce(
                    parameter.grad, group=parallel_state.get_tensor_model_parallel_group()
                )
            gradients[name] = parameter.grad.cpu()
    if groups.is_main():
        torch.save(gradients, out)
    groups.finalize()


if __name__ == "__main__":
    main()

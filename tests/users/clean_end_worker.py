"""Run by torchrun: trains one step, keeps all of it in global names, and ends the way that is asked for.

Prints the number of gloo's worker threads at the last moment before the interpreter is finalized.
"""

import atexit
import sys
from pathlib import Path

import torch

from mqat.checkpoints.random_weights import RandomWeights
from mqat.config import ModelConfig
from mqat.errors import UserError
from mqat.runtime import groups
from tests.distributed.worker import MODEL


def print_threads() -> None:
    names = [file.read_text().strip() for file in Path("/proc/self/task").glob("*/comm")]
    print("threads:", names.count("pt_gloo_runloop"), flush=True)


atexit.register(print_threads)  # handlers run in reverse order
ending = sys.argv[1]
with groups.command_line():
    groups.initialize(tensor_parallel=groups.world_size())
    from megatron.core import parallel_state

    from mqat.checkpoints.pretrained import load_pretrained_
    from mqat.specs.model import build_model
    from mqat.training.optimizer import wrap_for_training

    tp_group = parallel_state.get_tensor_model_parallel_group()
    settings = ModelConfig(tensor_model_parallel_size=groups.world_size())
    chunks = build_model(MODEL, settings, {}, torch.float32)
    load_pretrained_(chunks, RandomWeights(MODEL, 1, 0.1))
    chunks = wrap_for_training(chunks)
    tokens = torch.randint(0, 301, (2, 33), generator=torch.Generator().manual_seed(0))
    tokens = tokens.to(groups.device())
    positions = torch.arange(32, device=tokens.device).expand(2, 32)
    loss = chunks[0](tokens[:, :-1], positions, None, labels=tokens[:, 1:].contiguous()).mean()
    loss.backward()
    if ending == "user":
        raise UserError("group_size=7 does not fit")
    if ending == "fault":
        raise KeyError("a missing key")
    if ending == "exit":
        sys.exit(3)
    if ending == "control":  # torch's own way: the groups stay in the model's hands
        atexit.unregister(groups._end_threads)
        groups.finalize = lambda: torch.distributed.destroy_process_group()

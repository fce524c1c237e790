"""Saves a checkpoint without `if __name__ == "__main__"`, as scripts of users are at first."""

import sys
from pathlib import Path

from mqat.runtime import groups

with groups.command_line():
    groups.initialize()
    import torch

    from mqat.checkpoints.dist_checkpoint import save_checkpoint
    from mqat.checkpoints.pretrained import load_pretrained_
    from mqat.checkpoints.random_weights import RandomWeights
    from mqat.config import ModelConfig
    from mqat.specs.model import build_model
    from tests.unit.model_fixtures import MODEL

    chunks = build_model(MODEL, ModelConfig(), {}, torch.float32)
    load_pretrained_(chunks, RandomWeights(MODEL, 1))
    save_checkpoint(Path(sys.argv[1]), chunks, model=MODEL, layers={}, algorithm=None)

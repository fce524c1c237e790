"""A gradient that is not finite changes no weight and is named."""

import re
from types import SimpleNamespace

import pytest
import torch

from mqat.config import OptimizerConfig
from mqat.errors import UserError
from tests.unit.model_fixtures import microbatches


def train(chunks, steps, tmp_path):
    from mqat.checkpoints.dist_checkpoint import TrainingState
    from mqat.training.log import RunLog
    from mqat.training.loop import Phase, train_phase
    from mqat.training.optimizer import build_optimizer

    optimizer, scheduler = build_optimizer(
        chunks, OptimizerConfig(lr=1e-3), max_steps=4, clip_grad=1.0
    )
    state = TrainingState(optimizer, scheduler)
    batches = SimpleNamespace(microbatches=lambda _: microbatches(), global_batch_size=4)
    train_phase(
        Phase("qat", steps), chunks, state, batches, RunLog(tmp_path, enabled=False),
        validate=lambda: 0.0, save=lambda _: None, directory=tmp_path,
    )  # fmt: skip


def weights(chunks):
    return [p.detach().clone() for chunk in chunks for p in chunk.parameters()]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_is_named_before_weights_move(
    calibrated, monkeypatch, tmp_path, value
):
    from mqat.training import loop

    chunks = calibrated("int8")
    real = loop.forward_backward

    def poisoned(*args, **options):
        result = real(*args, **options)
        chunks[0].module.decoder.layers[1].mlp.linear_fc2.weight.main_grad[3, 5] = value
        return result

    monkeypatch.setattr(loop, "forward_backward", poisoned)
    before = weights(chunks)
    name = "decoder.layers.1.mlp.linear_fc2.weight"
    with pytest.raises(UserError, match=rf"at step 1, with a finite loss .*{re.escape(name)}\. No"):
        train(chunks, 1, tmp_path)
    assert all(map(torch.equal, before, weights(chunks)))


def test_finite_gradients_move_weights(calibrated, tmp_path):
    chunks = calibrated("int8")
    before = weights(chunks)
    train(chunks, 1, tmp_path)
    assert not all(map(torch.equal, before, weights(chunks)))

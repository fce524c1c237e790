"""A resumed run has the optimizer's state of the checkpoint, and its own learning rates."""

from types import SimpleNamespace

import pytest

from mqat.config import OptimizerConfig, SchedulerConfig
from tests.unit.model_fixtures import MODEL, microbatches


@pytest.mark.parametrize("schedule", ["constant", "CosineAnnealing"])
def test_another_learning_rate_counts_from_the_step_of_the_checkpoint(
    calibrated, tmp_path, schedule
):
    from mqat.checkpoints.dist_checkpoint import TrainingState, load_checkpoint, save_checkpoint
    from mqat.training.log import RunLog
    from mqat.training.loop import Phase, train_phase
    from mqat.training.optimizer import build_optimizer

    chunks = calibrated("null")

    def run(lr, steps, source=None):
        settings = OptimizerConfig(lr=lr, sched=SchedulerConfig(name=schedule, min_lr=lr / 10))
        state = TrainingState(*build_optimizer(chunks, settings, max_steps=4, clip_grad=1.0))
        if source is not None:
            load_checkpoint(source, chunks, layers={}, training=state)
        batches = SimpleNamespace(microbatches=lambda _: microbatches(), global_batch_size=4)
        with RunLog(tmp_path, enabled=False) as log:
            train_phase(
                Phase("qat", steps), chunks, state, batches, log,
                validate=lambda: 0.0, save=lambda _: None, directory=tmp_path,
            )  # fmt: skip
        (optimizer,) = state.optimizer.chained_optimizers
        (moments,) = {float(s["step"]) for s in optimizer.optimizer.state.values()}
        return state, [g["lr"] for g in optimizer.optimizer.param_groups], moments

    first, _, _ = run(1e-3, 2)
    save_checkpoint(
        tmp_path / "step_2", chunks, model=MODEL, layers={}, algorithm=None, training=first
    )
    _, kept, steps = run(1e-3, 4, tmp_path / "step_2")
    _, lowered, _ = run(5e-4, 4, tmp_path / "step_2")
    assert steps == 4  # of AdamW: it went on
    assert lowered == pytest.approx([rate / 2 for rate in kept]) and min(kept) > 0

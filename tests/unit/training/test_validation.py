"""Which states are kept, which one a phase ends with, and when it ends early."""

import math
from types import SimpleNamespace

import pytest

from mqat.training.validation import ValidationRules, Validations
from tests.unit.model_fixtures import MODEL, microbatches


def validations(losses, *, saved=(), settled_after=0, **rules):
    return Validations(ValidationRules(**rules), losses, saved, settled_after)


def test_the_best_states_are_kept_and_of_equal_ones_the_earlier():
    found = validations({}, save_top_k=2)
    kept = [found.add(step, loss) for step, loss in [(1, 3.0), (2, 2.0), (3, 2.0), (4, 2.5)]]
    assert kept == [True, True, True, False] and found.best() == [2, 3]


def test_only_states_that_are_on_disk_can_be_gone_back_to():
    losses = {5: 1.0, 10: 2.0, 15: 3.0}
    assert validations(losses, saved=[10, 15], save_top_k=1).best() == [10]
    assert validations(losses, saved=[5, 10, 15], save_top_k=1).best() == [5]  # control


def test_losses_before_all_is_quantized_are_none_of_the_served_model():
    found = validations({2: 1.0, 6: 2.0}, saved=[2, 6], settled_after=4, save_top_k=1, patience=1)
    assert found.best() == [6] and not found.has_stalled()
    assert not found.add(4, 0.5) and found.best() == [6]


@pytest.mark.parametrize(
    ("losses", "stalled"),
    [
        ([3.0, 2.0, 1.995, 1.991], True),  # lower, by no more than min_delta
        ([3.0, 2.0, 1.995, 1.98], False),
        ([3.0, 2.0, 2.5], False),
        ([3.0, math.nan, math.nan], True),
        ([], False),
    ],
)
def test_a_phase_stalls_after_as_many_validations_as_patience(losses, stalled):
    found = validations(dict(enumerate(losses, 1)), patience=2, min_delta=0.01)
    assert found.has_stalled() is stalled
    assert not validations(dict(enumerate(losses, 1))).has_stalled()  # unless asked for


def run(chunks, directory, losses, **settings):
    """A phase of eight steps whose validations return `losses`, by step."""
    from mqat.checkpoints.dist_checkpoint import (
        TrainingState,
        latest_checkpoint,
        load_checkpoint,
        save_checkpoint,
    )
    from mqat.config import OptimizerConfig
    from mqat.training.log import RunLog
    from mqat.training.loop import Phase, train_phase
    from mqat.training.optimizer import build_optimizer

    state = TrainingState(*build_optimizer(chunks, OptimizerConfig(), max_steps=8, clip_grad=1.0))
    latest = latest_checkpoint(directory)
    if latest is not None:
        load_checkpoint(latest, chunks, layers={}, training=state)
    batches = SimpleNamespace(microbatches=lambda _: microbatches(), global_batch_size=4)
    phase = Phase(
        "qat", 8, val_check_interval=2, validation=ValidationRules(**settings), keep_last=1
    )

    def save(path):
        save_checkpoint(
            path, chunks, model=MODEL, layers={}, algorithm=None, training=state
        )  # fmt: skip

    with RunLog(directory, enabled=True) as log:
        log.drop_steps_after("qat", state.step)
        best = train_phase(
            phase, chunks, state, batches, log,
            validate=lambda: losses[state.step], save=save, directory=directory,
        )  # fmt: skip
    return state.step, best, sorted(path.name for path in directory.glob("step_*"))


def test_a_phase_ends_with_its_best_state_and_keeps_no_worse_ones(calibrated, tmp_path, capsys):
    losses = {2: 3.0, 4: 2.0, 6: 2.5, 8: 2.4}
    step, best, kept = run(calibrated("null"), tmp_path, losses, save_top_k=1)
    assert (step, best, kept) == (8, tmp_path / "step_00000004", ["step_00000004"])
    assert (
        "goes on with the state after step 4, whose validation loss 2.0000"
        in capsys.readouterr().out
    )


def test_an_early_stop_is_said_and_holds_after_a_resume(calibrated, tmp_path, capsys):
    chunks = calibrated("null")
    losses = {2: 2.0, 4: 2.5, 6: 2.4, 8: 1.0}
    rules = {"patience": 2, "save_top_k": 1}
    assert run(chunks, tmp_path, losses, **rules)[0] == 6
    assert (
        "ended after step 6 of 8: no validation loss below 2.0000 (step 2)"
        in capsys.readouterr().out
    )
    # It goes on from step 2 (the one that was saved), and has forgotten what came after it.
    step, best, _ = run(chunks, tmp_path, losses | {4: 1.9, 6: 1.95}, **rules)
    assert (step, best) == (8, None)  # the last state is the best

"""One training phase: steps, schedule of fake quantization, validation, checkpoints, metrics."""

import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mqat.checkpoints.dist_checkpoint import (
    TrainingState,
    delete_old_checkpoints,
    saved_steps,
    step_directory,
)
from mqat.data.loader import Batches
from mqat.errors import UserError
from mqat.runtime.groups import (
    decided_by_main,
    is_main,
    largest_on_any_rank,
    on_all_ranks,
    peak_memory_bytes,
)
from mqat.runtime.interruption import Interrupted, stop_request
from mqat.training.distillation import Teacher
from mqat.training.gradients import nonfinite_gradients
from mqat.training.histograms import EDGES, gradient_histograms
from mqat.training.log import RunLog
from mqat.training.optimizer import prepare_gradients, step_with_gradients
from mqat.training.profiling import ProfiledSteps
from mqat.training.schedule import QuantizerSchedule
from mqat.training.step import forward_backward
from mqat.training.validation import ValidationRules, Validations


@dataclass(frozen=True)
class Phase:
    """What a phase does, by optimizer step.

    Attributes:
        name: Prefix of metrics and checkpoint directory, such as `qat`.
        max_steps: Steps in all, counted from the start of the phase.
        schedule: Which quantizers are on, and with how many bits.
        val_check_interval: Steps between validations; 0: none.
        log_every_n_steps: Steps between lines where the output is no terminal.
        checkpoint_interval: Steps between checkpoints; 0: by time alone.
        checkpoint_minutes: Time between checkpoints; 0: by steps alone.
        keep_last: Newest checkpoints that are kept; 0: all.
        keeps_last_state: A checkpoint with the optimizer's state after the last step too.
        validation: What follows from the losses of validations.
        offloads_activations: They wait in host memory for their backward pass.
        histogram_every_n_steps: Steps between histograms of gradients; 0: none.
    """

    name: str
    max_steps: int
    schedule: QuantizerSchedule = field(default_factory=QuantizerSchedule)
    val_check_interval: int = 0
    log_every_n_steps: int = 10
    checkpoint_interval: int = 0
    checkpoint_minutes: float = 0.0
    keep_last: int = 0
    keeps_last_state: bool = False
    validation: ValidationRules = field(default_factory=ValidationRules)
    offloads_activations: bool = False
    histogram_every_n_steps: int = 0


def train_phase(
    phase: Phase,
    chunks: Sequence[Any],
    state: TrainingState,
    batches: Batches,
    log: RunLog,
    *,
    validate: Callable[[], float],
    save: Callable[[Path], None],
    directory: Path,
    teacher: Teacher | None = None,
    profiled: ProfiledSteps | None = None,
) -> Path | None:
    """Runs the steps that are left of a phase.

    Args:
        phase: Length and intervals.
        chunks: DDP-wrapped chunks of this rank.
        state: Optimizer, scheduler and position; updated in place.
        batches: Training data, indexed by consumed samples.
        log: Metrics and progress.
        validate: Returns the validation loss per token; called on all ranks.
        save: Writes a checkpoint to the given path; called on all ranks.
        directory: Checkpoints go to `directory/step_N`.
        teacher: Whom the model learns from; None: the labels alone.
        profiled: Steps that are profiled; None: none.

    Returns:
        The checkpoint of the best state, where best states are kept and it is not the last one.

    Raises:
        UserError: On every rank, before a weight has changed: loss or gradient norm is not finite.
        Interrupted: On every rank, after a checkpoint: one of them got SIGTERM or Ctrl-C.
    """
    steps = log.steps(
        phase.name, phase.max_steps, state.step, every_n_steps=phase.log_every_n_steps
    )
    validations = decided_by_main(lambda: _earlier_validations(phase, log, directory))
    saved = time.monotonic()
    with stop_request() as request, steps as report, _profiling(profiled, log):
        while state.step < phase.max_steps and not validations.has_stalled():
            started = time.perf_counter()
            phase.schedule.apply_(chunks, state.step)
            if profiled is not None:
                profiled.before(state.step + 1)
            metrics = _train_step(phase, chunks, state, batches, log, teacher)
            if profiled is not None and (said := profiled.after(state.step)):
                log.say(said)
            seconds = time.perf_counter() - started
            metrics["tokens_per_second"] = metrics.pop("tokens") / seconds
            metrics["peak_memory_bytes"] = peak_memory_bytes()
            is_best = False
            if _validates(phase, state.step):
                metrics["validation_loss"] = loss = validate()
                is_best = validations.add(state.step, loss)
            report.step(state.step, metrics)
            is_last = state.step == phase.max_steps or validations.has_stalled()
            minutes = (time.monotonic() - saved) / 60
            is_late = 0 < phase.checkpoint_minutes <= minutes
            number, late = largest_on_any_rank([request.number, is_late])
            is_due = late or is_best or _due(state.step, phase.checkpoint_interval)
            if number or (phase.keeps_last_state if is_last else is_due):
                path = step_directory(directory, state.step)
                save(path)
                log.say(f"  {phase.name}: saved {path}")
                saved = time.monotonic()
                with on_all_ranks():
                    if phase.keep_last and is_main():
                        delete_old_checkpoints(directory, phase.keep_last, validations.best())
            if number:
                raise Interrupted(
                    f"{signal.Signals(number).name}: {phase.name} ended after step {state.step} of "
                    f"{phase.max_steps} and saved {path}; the same command with "
                    "exp_manager.resume_if_exists=true goes on from there.",
                    number,
                    is_agreed=True,
                )
    QuantizerSchedule().apply_(chunks, phase.max_steps)
    return _end(phase, state.step, validations, log, directory)


@contextmanager
def _profiling(profiled: ProfiledSteps | None, log: RunLog) -> Iterator[None]:
    """Afterwards no window is open."""
    try:
        yield
    finally:
        if profiled is not None and (said := profiled.close()):
            log.say(said)


def _earlier_validations(phase: Phase, log: RunLog, directory: Path) -> Validations:
    return Validations(
        phase.validation,
        log.validation_losses(phase.name),
        saved_steps(directory),
        phase.schedule.settled_after,
    )


def _validates(phase: Phase, step: int) -> bool:
    is_last_candidate = phase.validation.save_top_k > 0 and step == phase.max_steps
    return _due(step, phase.val_check_interval) or is_last_candidate


def _end(
    phase: Phase, step: int, validations: Validations, log: RunLog, directory: Path
) -> Path | None:
    """Says how a phase ended, if not by its number of steps; where its best state is."""
    if step < phase.max_steps:
        lowest = min(validations.losses, key=lambda at: validations.losses[at])
        log.say(
            f"  {phase.name}: ended after step {step} of {phase.max_steps}: no validation loss below "
            f"{validations.losses[lowest]:.4f} (step {lowest}) by more than "
            f"{phase.validation.min_delta:g} in {phase.validation.patience} validations"
        )
    best = validations.best()
    if not best or best[0] == step:
        return None
    log.say(
        f"  {phase.name}: goes on with the state after step {best[0]}, whose validation loss "
        f"{validations.losses[best[0]]:.4f} is the lowest"
    )
    return step_directory(directory, best[0])


def _train_step(
    phase: Phase,
    chunks: Sequence[Any],
    state: TrainingState,
    batches: Batches,
    log: RunLog,
    teacher: Teacher | None,
) -> dict[str, float]:
    """One optimizer step; what was measured of it, with its number of `tokens`."""
    for chunk in chunks:
        chunk.zero_grad_buffer()
    state.optimizer.zero_grad()
    microbatches = batches.microbatches(state.consumed_samples)
    sums = forward_backward(
        chunks,
        microbatches,
        step=state.step,
        teacher=teacher,
        offloads_activations=phase.offloads_activations,
    )
    tokens = sums.pop("tokens")
    means = {key: value / max(tokens, 1) for key, value in sums.items()}
    loss = means["loss"]
    if not math.isfinite(loss):
        raise UserError(
            f"{phase.name}: loss is {loss} at step {state.step + 1}. Lower "
            "model.optim.lr, or resume from the last checkpoint with other data."
        )
    grad_norm = prepare_gradients(state.optimizer)
    if not math.isfinite(grad_norm):
        names = nonfinite_gradients(chunks)
        raise UserError(
            f"{phase.name}: the gradient norm is {grad_norm} at step {state.step + 1}, with a "
            f"finite loss of {loss:.4g}; not finite: {', '.join(names[:3]) or 'their sum'}"
            f"{f' and {len(names) - 3} more' if len(names) > 3 else ''}. No weight has changed. "
            "Lower model.optim.lr, or resume from the last checkpoint with other data."
        )
    if _due(state.step + 1, phase.histogram_every_n_steps):
        for name, counts in gradient_histograms(chunks, state.optimizer).items():
            log.histogram(phase.name, state.step + 1, f"log2 gradient/{name}", EDGES, counts)
    step_with_gradients(state.optimizer, grad_norm)
    lr = state.optimizer.param_groups[0]["lr"]
    state.scheduler.step(increment=1)
    state.step += 1
    state.consumed_samples += batches.global_batch_size
    return means | {
        "lr": lr,
        "grad_norm": grad_norm,
        "tokens": tokens,
        "consumed_samples": state.consumed_samples,
    }


def _due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0

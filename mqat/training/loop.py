"""One training phase: steps, schedule of fake quantization, validation, checkpoints, metrics."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mqat.checkpoints.dist_checkpoint import TrainingState
from mqat.data.loader import Batches
from mqat.errors import UserError
from mqat.training.gradients import nonfinite_gradients
from mqat.training.log import RunLog
from mqat.training.optimizer import prepare_gradients, step_with_gradients
from mqat.training.schedule import QuantizerSchedule
from mqat.training.step import forward_backward


@dataclass(frozen=True)
class Phase:
    """What a phase does, by optimizer step.

    Attributes:
        name: Prefix of metrics and checkpoint directory, such as `qat`.
        max_steps: Steps in all, counted from the start of the phase.
        schedule: Which quantizers are on, and with how many bits.
        val_check_interval: Steps between validations; 0: none.
        checkpoint_interval: Steps between checkpoints; 0: none.
        keeps_last_state: A checkpoint with the optimizer's state after the last step too.
    """

    name: str
    max_steps: int
    schedule: QuantizerSchedule = field(default_factory=QuantizerSchedule)
    val_check_interval: int = 0
    checkpoint_interval: int = 0
    keeps_last_state: bool = False


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
) -> None:
    """Runs the steps that are left of a phase.

    Args:
        phase: Length and intervals.
        chunks: DDP-wrapped chunks of this rank.
        state: Optimizer, scheduler and position; updated in place.
        batches: Training data, indexed by consumed samples.
        log: Metrics and progress bar.
        validate: Returns the validation loss per token; called on all ranks.
        save: Writes a checkpoint to the given path; called on all ranks.
        directory: Checkpoints go to `directory/step_N`.

    Raises:
        UserError: On every rank, before a weight has changed: loss or gradient norm is not finite.
    """
    with log.progress() as progress:
        task = progress.add_task(phase.name, total=phase.max_steps, completed=state.step, note="")
        while state.step < phase.max_steps:
            started = time.perf_counter()
            phase.schedule.apply_(chunks, state.step)
            for chunk in chunks:
                chunk.zero_grad_buffer()
            state.optimizer.zero_grad()
            loss_sum, tokens = forward_backward(
                chunks, batches.microbatches(state.consumed_samples), step=state.step
            )
            loss = loss_sum / max(tokens, 1)
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
            step_with_gradients(state.optimizer, grad_norm)
            lr = state.optimizer.param_groups[0]["lr"]
            state.scheduler.step(increment=1)
            state.step += 1
            state.consumed_samples += batches.global_batch_size
            seconds = time.perf_counter() - started
            speed = tokens / seconds
            metrics = {
                "loss": loss,
                "lr": lr,
                "grad_norm": grad_norm,
                "tokens_per_second": speed,
                "consumed_samples": state.consumed_samples,
            }
            if _due(state.step, phase.val_check_interval):
                metrics["validation_loss"] = validate()
            log.metrics(phase.name, state.step, metrics)
            note = f"loss {loss:.3f}  {speed:.0f} tokens/s"
            progress.update(task, completed=state.step, note=note)
            is_last = state.step == phase.max_steps
            if phase.keeps_last_state if is_last else _due(state.step, phase.checkpoint_interval):
                save(directory / f"step_{state.step:08d}")
    QuantizerSchedule().apply_(chunks, phase.max_steps)


def _due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0

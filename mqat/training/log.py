"""What a run leaves for people and programs: `metrics.jsonl`, loggers, a progress bar or lines.

Only the first rank writes; the others hold the same object and do nothing.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mqat.errors import UserError
from mqat.files import write_whole
from mqat.runtime.interruption import Interrupted
from mqat.training.loggers import Logger, RunEnd


class RunLog:
    """Writes a line a step into a run directory; use as a context manager.

    `enabled`: on the first rank only; `loggers`: those it tells, too (`loggers.open_loggers`).
    """

    def __init__(self, directory: Path, *, enabled: bool, loggers: Sequence[Logger] = ()) -> None:
        self.enabled = enabled
        self.console = Console(quiet=not enabled, highlight=False)
        self._path = directory / "metrics.jsonl"
        self._file = self._path.open("a", encoding="utf-8") if enabled else None
        self._loggers = list(loggers)

    def __enter__(self) -> RunLog:
        """Returns itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Closes the files, and says how the run ended."""
        end = RunEnd.FINISHED if kind is None else RunEnd.FAILED
        if kind is not None and issubclass(kind, Interrupted | KeyboardInterrupt):
            end = RunEnd.INTERRUPTED
        if self._file is not None:
            self._file.close()
        for logger in list(self._loggers):
            self._tell(logger, lambda logger: logger.close(end))

    def _tell(self, logger: Logger, what: Callable[[Logger], None]) -> None:
        """A logger that fails is left out from here on: training goes on without it."""
        try:
            what(logger)
        except Exception as error:  # of whatever kind its package, network or server has
            self._loggers.remove(logger)
            reason = (str(error).splitlines() or [""])[0]
            self.say(
                f"{type(logger).__name__} is told nothing more: {type(error).__name__}: {reason}. "
                f"{self._path.name} has everything."
            )

    def say(self, text: str) -> None:
        """One line for people, from the first rank only."""
        self.console.print(text, soft_wrap=True)

    def drop_steps_after(self, phase: str, step: int) -> None:
        """Removes lines of steps that a resumed phase takes again, so that each step has one line.

        A last line that was cut off with its process goes, too; TensorBoard's events stay.

        Raises:
            UserError: Another line is damaged.
        """
        if self._file is None:
            return
        lines = self._path.read_text("utf-8").splitlines(keepends=True)
        entries = self._entries()
        kept = [
            lines[i] for i, e in entries.items() if not (e["phase"] == phase and e["step"] > step)
        ]
        if kept == lines:
            return
        self._file.close()
        write_whole(self._path, "".join(kept))
        self._file = self._path.open("a", encoding="utf-8")

    def _entries(self) -> dict[int, dict[str, Any]]:
        """What whole lines of `metrics.jsonl` say, by their index."""
        entries = {}
        for index, line in enumerate(self._path.read_text("utf-8").splitlines(keepends=True)):
            if not line.endswith("\n"):
                continue
            try:
                entries[index] = json.loads(line)
                _ = entries[index]["phase"], int(entries[index]["step"])
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f"{self._path}:{index + 1}: damaged ({error}); delete the line to resume without it."
                ) from error
        return entries

    def validation_losses(self, phase: str) -> dict[int, float]:
        """Of the steps of a phase so far, as the file has them; empty on other ranks.

        Raises:
            UserError: A line is damaged.
        """
        if self._file is None:
            return {}
        return {
            entry["step"]: entry["validation_loss"]
            for entry in self._entries().values()
            if entry["phase"] == phase and "validation_loss" in entry
        }

    def metrics(self, phase: str, step: int, values: dict[str, float]) -> None:
        """One line of `metrics.jsonl`, flushed, and the same values for the loggers."""
        if self._file is None:
            return
        self._file.write(json.dumps({"phase": phase, "step": step, **values}) + "\n")
        self._file.flush()
        for logger in list(self._loggers):
            self._tell(logger, lambda logger: logger.metrics(phase, step, values))

    def histogram(
        self, phase: str, step: int, name: str, edges: Sequence[float], counts: Sequence[int]
    ) -> None:
        """For the loggers that draw them."""
        for logger in list(self._loggers):
            self._tell(logger, lambda logger: logger.histogram(phase, step, name, edges, counts))

    def measured(
        self, model: str, loss: float, perplexity: float, samples: Mapping[str, str]
    ) -> None:
        """A model on held-out text: numbers, and what it says to each prompt."""
        for logger in list(self._loggers):
            self._tell(logger, lambda logger: logger.measured(model, loss, perplexity, samples))

    def hyperparameters(
        self, settings: Mapping[str, Any], perplexities: Mapping[str, float]
    ) -> None:
        """The settings of a finished run beside its perplexities, for tables of runs."""
        for logger in list(self._loggers):
            self._tell(logger, lambda logger: logger.hyperparameters(settings, perplexities))

    def steps(self, phase: str, total: int, done: int, *, every_n_steps: int) -> StepReport:
        """What people see of a phase, as a context manager; silent on the other ranks.

        Args:
            phase: Its name.
            total: Steps in all.
            done: Of these, before now.
            every_n_steps: A line so often, where the output is no terminal; on one, a bar.
        """
        return StepReport(self, phase, total, done, every_n_steps)


class StepReport:
    """A progress bar on a terminal, otherwise lines; says when the loss starts to diverge."""

    def __init__(self, log: RunLog, phase: str, total: int, done: int, every_n_steps: int) -> None:
        self._log, self._phase, self._total, self._every = log, phase, total, every_n_steps
        self._first, self._step = done, done
        self._started = time.monotonic()
        self._trend = LossTrend()
        self._bar: Progress | None = None
        if log.console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=log.console,
            )
            self._task = self._bar.add_task(phase, total=total, completed=done, note="")

    def __enter__(self) -> StepReport:
        """Shows the bar, if there is one."""
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Leaves the bar as it is."""
        if self._bar is not None:
            self._bar.stop()

    def step(self, step: int, values: dict[str, float]) -> None:
        """After each optimizer step; `values` are those of `metrics.jsonl`."""
        self._log.metrics(self._phase, step, values)
        memory = f"{values['peak_memory_bytes'] / 2**30:.1f} GiB"
        speed = f"{values['tokens_per_second']:.0f} tokens/s"
        if self._bar is not None:
            note = f"loss {values['loss']:.3f}  {speed}  {memory}"
            self._bar.update(self._task, completed=step, note=note)
        elif step % self._every == 0 or step in (self._first + 1, self._total):
            seconds = (time.monotonic() - self._started) / (step - self._first)
            left = timedelta(seconds=round(seconds * (self._total - step)))
            self._log.say(
                f"  {self._phase} {step}/{self._total}  loss {values['loss']:.4f}  "
                f"lr {values['lr']:.3g}  grad norm {values['grad_norm']:.3g}  {speed}  "
                f"{left} left  {memory}"
            )
        if "validation_loss" in values:
            self._log.say(
                f"  {self._phase} {step}/{self._total}  validation loss {values['validation_loss']:.4f}"
            )
        if self._trend.begins_to_diverge(values["loss"]):
            self._log.say(
                f"  {self._phase} {step}/{self._total}  the loss rises: {self._trend.smoothed:.4f} "
                f"over the last steps, {self._trend.lowest:.4f} at its best. If it goes on so, lower "
                "model.optim.lr."
            )


class LossTrend:
    """Tells when a loss, smoothed over some ten steps, has risen well above its best.

    Attributes:
        smoothed: Exponential mean; NaN before the first loss.
        lowest: Its smallest value so far.
    """

    # Noise of single batches is far less once ten of them are averaged; a run that diverges gains more
    # within few steps.
    _RISE = 0.3  # nats a token

    def __init__(self) -> None:
        self.smoothed, self.lowest = math.nan, math.inf
        self._steps, self._was_said = 0, False

    def begins_to_diverge(self, loss: float) -> bool:
        """Takes the loss of a step; true once for each time that it leaves its best."""
        self._steps += 1
        self.smoothed = loss if self._steps == 1 else 0.9 * self.smoothed + 0.1 * loss
        if self._steps >= 10:
            self.lowest = min(self.lowest, self.smoothed)
        is_high = self.smoothed > self.lowest + self._RISE
        begins = is_high and not self._was_said
        self._was_said = is_high
        return begins

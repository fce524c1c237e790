"""What a run leaves for people and programs: `metrics.jsonl`, TensorBoard, a progress bar.

Only the first rank writes; the others hold the same object and do nothing.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mqat.errors import UserError
from mqat.files import write_whole


class RunLog:
    """Writes a line a step into a run directory; use as a context manager.

    `enabled`: on the first rank only; `tensorboard`: also write events, under `directory/tensorboard`.
    """

    def __init__(self, directory: Path, *, enabled: bool, tensorboard: bool) -> None:
        self.enabled = enabled
        self.console = Console(quiet=not enabled, highlight=False)
        self._path = directory / "metrics.jsonl"
        self._file = self._path.open("a", encoding="utf-8") if enabled else None
        self._board: Any = None
        if enabled and tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(directory / "tensorboard"))

    def __enter__(self) -> RunLog:
        """Returns itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes the files."""
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()

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
        kept = []
        for number, line in enumerate(lines, start=1):
            if not line.endswith("\n"):
                continue
            try:
                entry = json.loads(line)
                is_again = entry["phase"] == phase and entry["step"] > step
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f"{self._path}:{number}: damaged ({error}); delete the line to resume without it."
                ) from error
            if not is_again:
                kept.append(line)
        if kept == lines:
            return
        self._file.close()
        write_whole(self._path, "".join(kept))
        self._file = self._path.open("a", encoding="utf-8")

    def metrics(self, phase: str, step: int, values: dict[str, float]) -> None:
        """One line of `metrics.jsonl`, flushed, and the same values for TensorBoard."""
        if self._file is None:
            return
        self._file.write(json.dumps({"phase": phase, "step": step, **values}) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(f"{phase}/{name}", value, step)

    def progress(self) -> Progress:
        """A progress bar with a free-text column; silent on the other ranks."""
        return Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=self.console,
        )

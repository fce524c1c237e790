"""A window of steps under torch's profiler: a trace for Perfetto, and costs by operator."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mqat.experiment_config import ProfileConfig
from mqat.files import write_whole


class ProfiledSteps:
    """Profiles steps `start_step` to `end_step` of a phase on the ranks that are asked for.

    Args:
        settings: The window; none where `start_step` is 0.
        directory: Where `<phase>_rank<N>.json` (a Chrome trace) and `.txt` (costs by operator) go.
        phase: Name of the phase.
    """

    def __init__(self, settings: ProfileConfig, directory: Path, phase: str) -> None:
        self._settings, self._directory, self._phase = settings, directory, phase
        rank = dist.get_rank() if dist.is_initialized() else 0
        self._is_wanted = settings.start_step > 0 and rank in settings.ranks
        self._rank = rank
        self._profiler: Any = None

    def before(self, step: int) -> None:
        """Call before a step, counted from 1."""
        if not self._is_wanted or step != self._settings.start_step:
            return
        activities = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._profiler = torch.profiler.profile(
            activities=activities,
            with_stack=self._settings.with_stack,
            profile_memory=self._settings.profile_memory,
        )
        self._profiler.start()

    def after(self, step: int) -> str | None:
        """Call after it; at the end of the window: what was written, for people."""
        if self._profiler is None or step < self._settings.end_step:
            return None
        return self.close()

    def close(self) -> str | None:
        """Ends a window that is open, and writes what it has."""
        if self._profiler is None:
            return None
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        self._directory.mkdir(parents=True, exist_ok=True)
        trace = self._directory / f"{self._phase}_rank{self._rank}.json"
        temporary = trace.with_name(f".{trace.name}.tmp.json")
        profiler.export_chrome_trace(str(temporary))
        temporary.rename(trace)
        by = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = profiler.key_averages().table(sort_by=by, row_limit=50)
        write_whole(trace.with_suffix(".txt"), table)
        return f"  {self._phase}: profile of steps {self._settings.start_step} on in {trace}"

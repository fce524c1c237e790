"""Evaluation tasks through lm-evaluation-harness (extra `eval`): same tasks, same metrics, our models.

Its tasks are looked up and their data loaded before a model is; what it computes of the answers is its
own. Sources: lm-evaluation-harness 0.4.13, `evaluator.py`, `api/model.py`, `models/huggingface.py`.
"""

import difflib
import importlib.metadata
import importlib.util
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mqat.errors import UserError
from mqat.evaluation.text_model import TextModel
from mqat.files import write_json

_SUMMARY, _CONFIG = "summary.json", "config.yaml"
_DRAWS = 100  # bootstrap samples of the standard errors that have no formula
_LEVELS_UP = 3  # a run directory is at most so far above what it holds


class Tasks:
    """Tasks by name, found and with their data at hand.

    Raises:
        UserError: The package is missing, a task unknown, or its data not on this machine.
    """

    def __init__(self, names: Sequence[str], include_path: Path | None = None) -> None:
        if importlib.util.find_spec("lm_eval") is None:
            raise UserError(
                "--tasks: lm-evaluation-harness is not installed; install mqat[eval] (or lm-eval), or "
                "evaluate a text with --text."
            )
        if include_path is not None and not include_path.is_dir():
            raise UserError(f"--include-path {include_path}: no such folder of task files.")
        self.manager = _manager(names, include_path)
        self.names: list[str] = []
        for name in names:
            matched = self.manager.match_tasks([name])
            if not matched:
                raise UserError(f"--tasks: {name!r} is unknown; {self._nearest(name)}")
            self.names += [found for found in matched if found not in self.names]
        for name in self.names:
            self._load(name)

    def _nearest(self, name: str) -> str:
        near = difflib.get_close_matches(name, self.manager.all_tasks, n=3)
        listed = f"{len(self.manager.all_tasks)} are listed by `lm-eval ls tasks`"
        return f"did you mean {' or '.join(map(repr, near))}? {listed}." if near else f"{listed}."

    def _load(self, name: str) -> None:
        try:
            self.manager.load([name])
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"--tasks: {name} cannot be loaded ({type(error).__name__}: {reason}). Without internet "
                "its data must be here already: load the task once on a machine that has it and bring "
                "the cache (HF_HOME), or write a task file with dataset_path: json and "
                "dataset_kwargs.data_files, and give its folder with --include-path."
            ) from error


def _manager(names: Sequence[str], include_path: Path | None) -> Any:
    """What knows the tasks: the folder alone if all are there, as listing the package takes long."""
    from lm_eval.tasks import TaskManager

    if include_path is None:
        return TaskManager()
    own = TaskManager(include_path=str(include_path), include_defaults=False)
    is_known = all(name in own.all_tasks for name in names)
    return own if is_known else TaskManager(include_path=str(include_path))


def evaluate_tasks(
    model: TextModel,
    tasks: Tasks,
    *,
    batch_size: int = 8,
    seq_length: int | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    chat: bool = False,
) -> dict[str, Any]:
    """What the harness finds; on the first rank, empty on others.

    Args:
        model: All ranks call.
        tasks: Which.
        batch_size: Sequences at once.
        seq_length: Most tokens of one; None: as the model's.
        num_fewshot: Examples before each question; None: as each task says.
        limit: Questions of each task; None: all.
        chat: Write questions in the model's chat template.

    Returns:
        `tasks`: task or group -> its metrics, as the harness names them (`word_perplexity,none`) without
        the filter `none`; `samples`, `num_fewshot`, `versions`, and what was asked for.
    """
    import lm_eval

    from mqat.evaluation.harness_model import HarnessModel

    if seq_length is not None and seq_length > model.longest:
        raise UserError(
            f"--seq-length {seq_length}: the model takes at most {model.longest} tokens "
            "(max_position_embeddings)."
        )
    asked = HarnessModel(model, batch_size=batch_size, longest=seq_length)
    with _without_processes():
        found = lm_eval.simple_evaluate(
            asked, tasks=tasks.names, task_manager=tasks.manager, num_fewshot=num_fewshot,
            limit=limit, log_samples=False, bootstrap_iters=_DRAWS, apply_chat_template=chat,
        )  # fmt: skip
    if found is None:  # the harness has results on the first process of a machine
        return {}
    return {
        "tasks": {name: _metrics(values) for name, values in found["results"].items()},
        "samples": {name: counts["effective"] for name, counts in found["n-samples"].items()},
        "num_fewshot": found["n-shot"],
        "versions": found["versions"],
        "lm_eval": importlib.metadata.version("lm_eval"),
        "limit": limit,
        "seq_length": asked.longest,
        "chat": chat,
    }


def _metrics(values: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of one task."""
    return {
        key.removesuffix(",none"): float(value)
        for key, value in values.items()
        if isinstance(value, int | float) and key != "sample_len"
    }


@contextmanager
def _without_processes() -> Iterator[None]:
    """Inside, the harness forks nothing for its bootstraps: a rank is in process groups."""
    name = "DISABLE_MULTIPROC"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def table(found: Mapping[str, Any]) -> str:
    """The metrics, a line each, with their standard errors."""
    lines = [f"{'task':<28} {'metric':<24} {'value':>10}  ±"]
    for task, metrics in found["tasks"].items():
        for metric, value in metrics.items():
            name, _, rest = metric.partition(",")
            if name.endswith("_stderr"):
                continue
            error = metrics.get(f"{name}_stderr" + (f",{rest}" if rest else ""))
            shown = "" if error is None else f"{error:.4f}"
            lines.append(f"{task:<28} {metric:<24} {value:>10.4f}  {shown}")
    return "\n".join(lines)


def add_to_summary(model: Path, found: Mapping[str, Any]) -> Path | None:
    """Writes the tasks' metrics into the `summary.json` of the run that holds `model`.

    Under `tasks`, by the model's path in the run and the task.

    Returns:
        That file; None: the model is in no run directory.
    """
    path = model.resolve()
    for directory in (path, *list(path.parents)[:_LEVELS_UP]):
        file = directory / _SUMMARY
        if file.is_file() and (directory / _CONFIG).is_file():
            summary = json.loads(file.read_text("utf-8"))
            own = summary.setdefault("tasks", {}).setdefault(str(path.relative_to(directory)), {})
            own |= found["tasks"]
            write_json(file, summary)
            return file
    return None

"""The run directory: an earlier run in it is continued, or put aside, but never mixed with a new one.

A run goes on with the settings it had. What a user may want otherwise has rules: more steps, and data or
a starting model that lie elsewhere now.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from mqat.checkpoints.manifest import DESCRIPTION
from mqat.config import RESUME_CHANGES, RunConfig, config_to_yaml
from mqat.errors import UserError
from mqat.files import write_json, write_whole

# What may change when a run goes on: where and how it runs, not what it computes.
_MAY_CHANGE = (
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.val_check_interval",
    "model.tensor_model_parallel_size",
    "model.pipeline_model_parallel_size",
    "model.virtual_pipeline_model_parallel_size",
    "model.context_parallel_size",
    "model.sequence_parallel",
    "model.micro_batch_size",
    "model.activations_checkpoint_",
    "model.megatron",
    "model.ddp",
    "model.transformer_engine",
    "export.",
    "exp_manager.",
)
# What a run writes: only this is ever moved, whatever else the directory holds.
_FILES = (
    "config.yaml", "metrics.jsonl", "summary.json", "tensorboard", "checkpoints", "checkpoint",
    "trtllm", "hf", "quality",
)  # fmt: skip


def open_run_directory(directory: Path, config: RunConfig) -> tuple[dict[str, Any], list[str]]:
    """Makes the directory ready for a run; call on one rank only.

    Without `exp_manager.resume_if_exists` the files of an earlier run are moved to `run_0`, `run_1`, ...
    inside the directory, as NeMo's experiment manager does.

    Returns:
        The summary to go on from: empty, or that of the run that is resumed, where phases that are to
        take more steps are no longer done. And a line for each setting that changed what is computed.

    Raises:
        UserError: The run to resume had other settings (names the first), its summary is damaged, or
            a phase to prolong left no optimizer state.
    """
    if not config.exp_manager.resume_if_exists:
        _put_aside(directory)
    summary = _previous_summary(directory)
    file = directory / "config.yaml"
    text = config_to_yaml(config)
    changes: dict[str, tuple[Any, Any]] = {}
    if config.exp_manager.resume_if_exists and file.is_file():
        changes = _changes(file, yaml.safe_load(file.read_text("utf-8")), yaml.safe_load(text))
    (directory / "checkpoints").mkdir(parents=True, exist_ok=True)
    if "trainer.max_steps" in changes:
        _reopen(directory, summary, took_steps=changes["trainer.max_steps"][0] > 0)
    write_whole(file, text)
    said = [f"resumed with {key}={now}, it was {was}" for key, (was, now) in changes.items()]
    if "trainer.max_steps" in changes and config.model.optim.sched.name != "constant":
        said.append("the learning rate goes on as if the run had had so many steps from its start")
    return summary, said


def _reopen(directory: Path, summary: dict[str, Any], *, took_steps: bool) -> None:
    """Takes finished phases that are to go on off the list of what is done, if they left their state."""
    finished = set(summary["tokens"]) - {"pretrain"}
    for phase in sorted(finished) if took_steps else ():
        if not any((directory / "checkpoints" / phase).glob(f"step_*/{DESCRIPTION}")):
            raise UserError(
                f"{directory}: {phase} is finished and left no optimizer state to go on from "
                f"(checkpoints/{phase} has no whole step_N), which runs with "
                "exp_manager.resume_if_exists or checkpoint_interval leave. Restore "
                "trainer.max_steps, or start a new run with "
                "model.restore_from_path at this run's checkpoint."
            )
    summary["done"] = [step for step in summary["done"] if step not in finished]
    write_json(directory / "summary.json", summary)


def _put_aside(directory: Path) -> None:
    if not directory.is_dir():
        return
    earlier = [directory / name for name in _FILES if (directory / name).exists()]
    if not earlier:
        return
    number = 0
    while (directory / f"run_{number}").exists():
        number += 1
    (directory / f"run_{number}").mkdir()
    for entry in earlier:
        entry.rename(directory / f"run_{number}" / entry.name)


def _previous_summary(directory: Path) -> dict[str, Any]:
    fresh: dict[str, Any] = {
        "done": [],
        "loss": {},
        "ppl": {},
        "samples": {},
        "tokens": {},
        "seconds": 0.0,
    }
    file = directory / "summary.json"
    if not file.is_file():
        return fresh
    try:
        previous = json.loads(file.read_text("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: damaged ({error}); delete it to start over.") from error
    previous["seconds_before"] = previous.get("seconds", 0.0)
    return dict(fresh | previous)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _changes(
    file: Path, before: Mapping[str, Any], now: Mapping[str, Any]
) -> dict[str, tuple[Any, Any]]:
    """Settings that change what is computed -> what they were, what they are; refuses forbidden ones."""
    current = dict(_flat(now))
    named = current["exp_manager.resume_changes"]
    constant = current["model.optim.sched.name"] == "constant"
    changes = {}
    earlier = dict(_flat(before))
    for key in earlier | current:
        value, present = earlier.get(key), current.get(key)  # absent: its section is null
        if value == present or key.startswith(_MAY_CHANGE):
            continue
        may = key in RESUME_CHANGES and (key != "trainer.max_steps" or current[key] > value)
        if not may or not (key in named or (key == "trainer.max_steps" and constant)):
            hint = f", go on with exp_manager.resume_changes=[{key}]" if may else ""
            raise UserError(
                f"{file}: the run to resume had {key}={value}, this one has {present}. Restore "
                f"the setting{hint}, or start a new run in another exp_manager.exp_dir."
            )
        changes[key] = (value, present)
    return changes

"""The run directory: an earlier run in it is continued, or put aside, but never mixed with a new one."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from mqat.config import RunConfig, config_to_yaml
from mqat.errors import UserError

# What may change when a run goes on: where and how it runs, not what it computes.
_MAY_CHANGE = (
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.val_check_interval",
    "model.tensor_model_parallel_size",
    "model.pipeline_model_parallel_size",
    "model.virtual_pipeline_model_parallel_size",
    "model.sequence_parallel",
    "model.micro_batch_size",
    "model.activations_checkpoint_granularity",
    "export.",
    "exp_manager.",
)
# What a run writes: only this is ever moved, whatever else the directory holds.
_FILES = (
    "config.yaml", "metrics.jsonl", "summary.json", "tensorboard", "checkpoints", "checkpoint",
    "trtllm", "hf", "quality",
)  # fmt: skip


def open_run_directory(directory: Path, config: RunConfig) -> dict[str, Any]:
    """Makes the directory ready for a run; call on one rank only.

    Without `exp_manager.resume_if_exists` the files of an earlier run are moved to `run_0`, `run_1`, ...
    inside the directory, as NeMo's experiment manager does.

    Returns:
        The summary to go on from: empty, or that of the run that is resumed.

    Raises:
        ValueError: The run to resume had other settings (names the first), or its summary is damaged.
    """
    if not config.exp_manager.resume_if_exists:
        _put_aside(directory)
    summary = _previous_summary(directory)
    file = directory / "config.yaml"
    text = config_to_yaml(config)
    if config.exp_manager.resume_if_exists and file.is_file():
        _check_same_run(file, yaml.safe_load(file.read_text("utf-8")), yaml.safe_load(text))
    (directory / "checkpoints").mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    return summary


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


def _check_same_run(file: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    current = dict(_flat(now))
    for key, value in _flat(before):
        if key in current and current[key] != value and not key.startswith(_MAY_CHANGE):
            raise UserError(
                f"{file}: the run to resume had {key}={value}, this one has {current[key]}. Restore "
                "the setting, or start a new run in another exp_manager.exp_dir."
            )

"""The run directory: an earlier run in it is continued, or put aside, but never mixed with a new one.

A run goes on with the settings it had. What a user may want otherwise has rules: more steps, another
learning rate, and data or a starting model that lie elsewhere now.
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
    "command",
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
    "quantization.distill.offload_teacher",
    "model.transformer_engine",
    "export.",
    "exp_manager.",
)
# What a run writes: only this is ever moved, whatever else the directory holds.
_FILES = (
    "config.yaml", "metrics.jsonl", "summary.json", "tensorboard", "checkpoints", "checkpoint",
    "trtllm", "hf", "gguf", "model.nemo", "adapter", "quality", "report.html", "profile",
    "histograms.jsonl", "loggers.json", "wandb", "mlflow.db", "mlruns",
)  # fmt: skip


def open_run_directory(directory: Path, config: RunConfig) -> tuple[dict[str, Any], list[str]]:
    """Makes the directory ready for a run; call on one rank only.

    An earlier run in it is continued where `exp_manager.resume_if_exists` is true, or is null and that
    run was interrupted and had the same settings. Otherwise its files are moved to `run_0`, `run_1`, ...
    inside the directory, as NeMo's experiment manager does.

    Returns:
        The summary to go on from: empty, or that of the run that is resumed, where phases that are to
        take more steps are no longer done. And lines for people: what became of an earlier run, and each
        setting that changed what is computed.

    Raises:
        UserError: The run to resume had other settings (names the first), its summary is damaged, a
            phase to prolong left no optimizer state, or this run starts from files that it would move.
    """
    resume, file = config.exp_manager.resume_if_exists, directory / "config.yaml"
    text = config_to_yaml(config)
    settings = yaml.safe_load(text)
    said = []
    if resume is None:
        resume = _is_interrupted(directory, settings)
        if resume:
            said.append(
                f"{directory}: going on with the run that was interrupted here; "
                "exp_manager.resume_if_exists=false starts anew"
            )
    if not resume:
        said += _put_aside(directory, config)
    summary = _previous_summary(directory)
    changes: dict[str, tuple[Any, Any]] = {}
    if resume and file.is_file():
        changes = _changes(file, _earlier_settings(file), settings)
    (directory / "checkpoints").mkdir(parents=True, exist_ok=True)
    if "trainer.max_steps" in changes:
        _reopen(directory, summary, took_steps=changes["trainer.max_steps"][0] > 0)
    write_whole(file, text)
    said += [f"resumed with {key}={now}, it was {was}" for key, (was, now) in changes.items()]
    if "trainer.max_steps" in changes and config.model.optim.sched.name != "constant":
        said.append("the learning rate goes on as if the run had had so many steps from its start")
    return summary, said


def _earlier_settings(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(file.read_text("utf-8"))
    return found


def _is_interrupted(directory: Path, settings: Mapping[str, Any]) -> bool:
    """Whether a run with these settings began in the directory and did not come to its end."""
    file = directory / "config.yaml"
    if not file.is_file() or _previous_summary(directory)["finished"]:
        return False
    earlier = dict(_flat(_earlier_settings(file)))
    current = dict(_flat(settings))
    return all(
        earlier.get(key) == current.get(key) or key.startswith(_MAY_CHANGE)
        for key in earlier | current
    )


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
    summary["finished"] = False
    write_json(directory / "summary.json", summary)


def _put_aside(directory: Path, config: RunConfig) -> list[str]:
    """Moves what an earlier run left; says so."""
    earlier = [directory / name for name in _FILES if (directory / name).exists()]
    if not earlier:
        return []
    model, distill = config.model, config.quantization.distill
    read = {
        "quantization.distill.teacher": [distill.teacher] if distill and distill.teacher else [],
        "model.restore_from_path": [model.restore_from_path] if model.restore_from_path else [],
        "model.data.train": model.data.train,
        "model.data.validation": model.data.validation,
    }
    for key, paths in read.items():
        for path in map(Path, paths):
            if any(path.resolve().is_relative_to(entry.resolve()) for entry in earlier):
                raise UserError(
                    f"{key}={path}: belongs to the earlier run in exp_manager.exp_dir={directory}, "
                    "which a new run moves out of its way. Choose another exp_manager.exp_dir."
                )
    number = 0
    while (directory / f"run_{number}").exists():
        number += 1
    aside = directory / f"run_{number}"
    aside.mkdir()
    for entry in earlier:
        entry.rename(aside / entry.name)
    return [
        f"{directory}: the earlier run is in {aside.name}/ now (exp_manager.resume_if_exists=true would "
        "have gone on with it)"
    ]


def _previous_summary(directory: Path) -> dict[str, Any]:
    fresh: dict[str, Any] = {
        "finished": False,
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
    # Releases before this key wrote the other one at the end of a run.
    previous.setdefault("finished", "gap_recovered" in previous)
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

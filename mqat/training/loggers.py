"""Where metrics go besides `metrics.jsonl`: TensorBoard, Weights & Biases, MLflow.

Only the first rank has loggers. A resumed run goes on with the runs it had there: their ids are in
`loggers.json`.
"""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, Protocol

import yaml

from mqat.config import RunConfig, config_to_yaml
from mqat.errors import UserError
from mqat.experiment_config import MlflowConfig, WandbConfig
from mqat.files import write_json
from mqat.training.about import flat_settings

_IDS = "loggers.json"


class RunEnd(Enum):
    """How a run ended; values are MLflow's words."""

    FINISHED = "FINISHED"
    INTERRUPTED = "KILLED"
    FAILED = "FAILED"


class Logger(Protocol):
    """What a run is told of."""

    def metrics(self, phase: str, step: int, values: Mapping[str, float]) -> None:
        """Of one step."""

    def histogram(
        self, phase: str, step: int, name: str, edges: Sequence[float], counts: Sequence[int]
    ) -> None:
        """Counts between neighbouring edges."""

    def measured(
        self, model: str, loss: float, perplexity: float, samples: Mapping[str, str]
    ) -> None:
        """Of a model on held-out text; `samples`: prompt -> answer."""

    def hyperparameters(
        self, settings: Mapping[str, Any], perplexities: Mapping[str, float]
    ) -> None:
        """Of a finished run; `perplexities`: model -> its own on held-out text."""

    def close(self, end: RunEnd) -> None:
        """Nothing follows."""


def open_loggers(config: RunConfig, directory: Path) -> list[Logger]:
    """The loggers that a run asks for; call on the first rank only.

    Raises:
        UserError: One cannot be reached.
    """
    manager = config.exp_manager
    found: list[Logger] = []
    settings = yaml.safe_load(config_to_yaml(config))
    if manager.create_tensorboard_logger:
        found.append(TensorBoard(directory))
    if manager.create_wandb_logger:
        found.append(Wandb(manager.wandb_logger_kwargs, directory, settings))
    if manager.create_mlflow_logger:
        found.append(Mlflow(manager.mlflow_logger_kwargs, directory, flat_settings(config)))
    return found


def _known_id(directory: Path, logger: str) -> str | None:
    """The id of the run that this one goes on with."""
    file = directory / _IDS
    if not file.is_file():
        return None
    try:
        known: str | None = json.loads(file.read_text("utf-8")).get(logger)
    except (ValueError, AttributeError) as error:
        raise UserError(f"{file}: damaged ({error}); delete it to log to new runs.") from error
    return known


def _remember(directory: Path, logger: str, identity: str) -> None:
    file = directory / _IDS
    known = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    write_json(file, known | {logger: identity})


class TensorBoard:
    """Events under `directory/tensorboard`."""

    def __init__(self, directory: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._board: Any = SummaryWriter(str(directory / "tensorboard"))

    def metrics(self, phase: str, step: int, values: Mapping[str, float]) -> None:
        """One scalar each."""
        for name, value in values.items():
            self._board.add_scalar(f"{phase}/{name}", value, step)

    def histogram(
        self, phase: str, step: int, name: str, edges: Sequence[float], counts: Sequence[int]
    ) -> None:
        """As TensorBoard draws them; moments are those of the bins' middles."""
        middles = [(a + b) / 2 for a, b in itertools.pairwise(edges)]
        weighted = list(zip(middles, counts, strict=True))
        self._board.add_histogram_raw(
            f"{phase}/{name}", min=edges[0], max=edges[-1], num=sum(counts),
            sum=sum(x * n for x, n in weighted), sum_squares=sum(x * x * n for x, n in weighted),
            bucket_limits=list(edges[1:]), bucket_counts=list(counts), global_step=step,
        )  # fmt: skip

    def measured(
        self, model: str, loss: float, perplexity: float, samples: Mapping[str, str]
    ) -> None:
        """Two scalars, and a text for each prompt."""
        self._board.add_scalar(f"held_out_loss/{model}", loss)
        self._board.add_scalar(f"perplexity/{model}", perplexity)
        for prompt, answer in samples.items():
            self._board.add_text(f"samples/{prompt}", f"**{model}**\n\n    {answer}")

    def hyperparameters(
        self, settings: Mapping[str, Any], perplexities: Mapping[str, float]
    ) -> None:
        """For TensorBoard's table of runs."""
        from torch.utils.tensorboard.summary import hparams

        plain = {
            key: value if isinstance(value, bool | int | float | str) else str(value)
            for key, value in settings.items()
        }
        found = {f"perplexity/{model}": value for model, value in perplexities.items()}
        for part in hparams(plain, found):
            self._board.file_writer.add_summary(part)

    def close(self, end: RunEnd) -> None:
        """Writes what is left."""
        self._board.close()


class Wandb:
    """A run of Weights & Biases; every phase has a step axis of its own, as its steps begin at 1."""

    def __init__(self, settings: WandbConfig, directory: Path, config: Mapping[str, Any]) -> None:
        import wandb

        self._wandb = wandb
        try:
            self._run = wandb.init(
                project=settings.project, entity=settings.entity, group=settings.group,
                name=settings.name or directory.name, tags=settings.tags or None,
                dir=str(directory), config=dict(config),
                mode="offline" if settings.offline else None,
                id=_known_id(directory, "wandb"), resume="allow",
            )  # fmt: skip
        except Exception as error:  # of its own types: no key, no network, no such entity
            raise UserError(
                f"exp_manager.create_wandb_logger: {(str(error).splitlines() or [''])[0]}. Log in with "
                "`wandb login`, or set exp_manager.wandb_logger_kwargs.offline=true."
            ) from error
        _remember(directory, "wandb", self._run.id)
        self._phases = set[str]()

    def _steps_of(self, phase: str, step: int) -> dict[str, int]:
        if phase not in self._phases:
            self._phases.add(phase)
            self._run.define_metric(f"{phase}/step")
            self._run.define_metric(f"{phase}/*", step_metric=f"{phase}/step")
        return {f"{phase}/step": step}

    def metrics(self, phase: str, step: int, values: Mapping[str, float]) -> None:
        """One row."""
        named = {f"{phase}/{name}": value for name, value in values.items()}
        self._run.log(self._steps_of(phase, step) | named)

    def histogram(
        self, phase: str, step: int, name: str, edges: Sequence[float], counts: Sequence[int]
    ) -> None:
        """One row with a histogram."""
        drawn = self._wandb.Histogram(np_histogram=(list(counts), list(edges)))
        self._run.log(self._steps_of(phase, step) | {f"{phase}/{name}": drawn})

    def measured(
        self, model: str, loss: float, perplexity: float, samples: Mapping[str, str]
    ) -> None:
        """Of the run as a whole; answers are in `summary.json`."""
        self._run.summary.update(
            {f"held_out_loss/{model}": loss, f"perplexity/{model}": perplexity}
        )

    def hyperparameters(
        self, settings: Mapping[str, Any], perplexities: Mapping[str, float]
    ) -> None:
        """Nothing: it had the settings at the start."""

    def close(self, end: RunEnd) -> None:
        """Sends what is left."""
        self._run.finish(exit_code=0 if end is RunEnd.FINISHED else 1)


class Mlflow:
    """A run of MLflow; it knows no histograms."""

    def __init__(self, settings: MlflowConfig, directory: Path, config: Mapping[str, Any]) -> None:
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        local = f"sqlite:///{(directory / 'mlflow.db').resolve()}"
        uri = settings.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or local
        self._client = MlflowClient(tracking_uri=uri)
        try:
            self._run_id = self._open(settings, directory, config)
        except MlflowException as error:
            raise UserError(
                f"exp_manager.create_mlflow_logger: {uri}: {(str(error).splitlines() or [''])[0]}"
            ) from error
        _remember(directory, "mlflow", self._run_id)

    def _open(self, settings: MlflowConfig, directory: Path, config: Mapping[str, Any]) -> str:
        from mlflow.entities import Param

        known = _known_id(directory, "mlflow")
        if known is not None:
            self._client.update_run(known, status="RUNNING")
            return known
        experiment = self._client.get_experiment_by_name(settings.experiment_name)
        place = (
            None if os.environ.get("MLFLOW_TRACKING_URI") or settings.tracking_uri else directory
        )
        number = (
            self._client.create_experiment(
                settings.experiment_name,
                artifact_location=None if place is None else (place / "mlruns").resolve().as_uri(),
            )
            if experiment is None
            else experiment.experiment_id
        )
        name = settings.run_name or directory.name
        run = self._client.create_run(number, run_name=name, tags=dict(settings.tags))
        params = [Param(key, str(value)[:6000]) for key, value in config.items()]
        for first in range(0, len(params), 100):  # a request's most
            self._client.log_batch(run.info.run_id, params=params[first : first + 100])
        return str(run.info.run_id)

    def metrics(self, phase: str, step: int, values: Mapping[str, float]) -> None:
        """One request."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        found = [Metric(f"{phase}/{key}", value, now, step) for key, value in values.items()]
        self._client.log_batch(self._run_id, metrics=found)

    def histogram(
        self, phase: str, step: int, name: str, edges: Sequence[float], counts: Sequence[int]
    ) -> None:
        """Nothing."""

    def measured(
        self, model: str, loss: float, perplexity: float, samples: Mapping[str, str]
    ) -> None:
        """Two metrics; answers are in `summary.json`."""
        self.metrics("held_out", 0, {f"loss/{model}": loss, f"perplexity/{model}": perplexity})

    def hyperparameters(
        self, settings: Mapping[str, Any], perplexities: Mapping[str, float]
    ) -> None:
        """Nothing: it had the settings at the start."""

    def close(self, end: RunEnd) -> None:
        """Says how it ended."""
        self._client.set_terminated(self._run_id, end.value)

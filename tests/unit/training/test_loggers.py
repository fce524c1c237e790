"""What loggers are told, and what happens when one is missing, fails, or goes on with its run."""

import json
import struct
from contextlib import nullcontext
from importlib.util import find_spec
from typing import ClassVar

import pytest

from mqat.config import load_config
from mqat.errors import UserError
from mqat.runtime.interruption import Interrupted
from mqat.training.log import RunLog
from mqat.training.loggers import RunEnd, TensorBoard, open_loggers

VALUES = {"loss": 2.5, "lr": 1e-5}


def config(directory, *overrides):
    return load_config(None, [f"exp_manager.exp_dir={directory}", *overrides])


@pytest.mark.parametrize("package", ["wandb", "mlflow"])
def test_a_logger_without_its_package_is_refused_before_anything_starts(package, monkeypatch):
    from mqat.plan import run_options

    asked = load_config(None, [f"exp_manager.create_{package}_logger=true"])
    monkeypatch.setattr(run_options, "find_spec", lambda _: None)
    with pytest.raises(
        UserError, match=rf"the package '{package}' is not installed; .*mqat\[{package}\]"
    ):
        run_options.check_run_options(asked)
    monkeypatch.setattr(run_options, "find_spec", lambda _: True)
    run_options.check_run_options(asked)


def test_tensorboard_has_scalars_and_histograms(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with RunLog(tmp_path, enabled=True, loggers=[TensorBoard(tmp_path)]) as log:
        log.metrics("qat", 3, VALUES)
        log.histogram("qat", 3, "gradients/fc1", [-1.0, 0.0, 1.0, 2.0], [1, 0, 3])
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (scalar,) = events.Scalars("qat/loss")
    (histogram,) = events.Histograms("qat/gradients/fc1")
    assert (scalar.step, scalar.value) == (3, 2.5)
    assert histogram.histogram_value.num == 4 and list(histogram.histogram_value.bucket) == [
        1,
        0,
        3,
    ]


def test_training_goes_on_without_a_logger_that_fails(tmp_path, capsys):
    class Broken:
        calls = 0

        def metrics(self, *_):
            self.calls += 1
            raise ConnectionError("no route to host")

    broken = Broken()
    with RunLog(tmp_path, enabled=True, loggers=[broken]) as log:
        log.metrics("qat", 1, VALUES)
        log.metrics("qat", 2, VALUES)
    assert broken.calls == 1 and len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    said = capsys.readouterr().out
    assert "Broken is told nothing more: ConnectionError: no route to host" in said


@pytest.mark.parametrize(
    ("error", "end"),
    [
        (None, RunEnd.FINISHED),
        (ValueError("a fault"), RunEnd.FAILED),
        (SystemExit(1), RunEnd.FAILED),
        (Interrupted("SIGTERM: training", 15), RunEnd.INTERRUPTED),
        (KeyboardInterrupt(), RunEnd.INTERRUPTED),
    ],
)
def test_loggers_are_told_how_a_run_ended(error, end, tmp_path):
    class Told:
        ends: ClassVar[list[RunEnd]] = []

        def close(self, end):
            self.ends.append(end)

    expected = nullcontext() if error is None else pytest.raises(type(error))
    with expected, RunLog(tmp_path, enabled=True, loggers=[Told()]):
        if error is not None:
            raise error
    assert Told.ends == [end]


def history(content):
    """Items of an offline run's rows: LevelDB's log format behind a header of seven bytes."""
    from wandb.proto import wandb_internal_pb2

    at, whole, block = 7, b"", 32768
    while at + 7 <= len(content):
        if block - at % block < 7:
            at += block - at % block
        length, kind = struct.unpack("<HB", content[at + 4 : at + 7])
        whole += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or its last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            whole = b""
            yield from record.history.item


@pytest.mark.skipif(find_spec("wandb") is None, reason="pip install 'mqat[wandb]'")
def test_wandb_offline_writes_a_run_that_is_gone_on_with(tmp_path, monkeypatch):
    import wandb

    monkeypatch.setenv("WANDB_SILENT", "true")
    asked = config(
        tmp_path, "exp_manager.create_wandb_logger=true", "exp_manager.create_tensorboard_logger=false",
        "exp_manager.wandb_logger_kwargs={project: p, offline: true, tags: [a]}",
    )  # fmt: skip
    ids = []
    for step in (1, 2):
        with RunLog(tmp_path, enabled=True, loggers=open_loggers(asked, tmp_path)) as log:
            log.metrics("qat", step, VALUES)
            log.histogram("qat", step, "gradients/fc1", [0.0, 1.0, 2.0], [1, 3])
        wandb.teardown()  # as if the process had ended
        ids.append(json.loads((tmp_path / "loggers.json").read_text())["wandb"])
    assert ids[0] == ids[1]
    files = sorted((tmp_path / "wandb").glob(f"offline-run-*/run-{ids[0]}.wandb"))
    assert files and all(file.stat().st_size > 0 for file in files)
    rows = {}
    for item in (item for file in files for item in history(file.read_bytes())):
        rows.setdefault(item.key or item.nested_key[0], []).append(item.value_json)
    assert rows["qat/loss"] == ["2.5", "2.5"] and rows["qat/step"][0] == "1"
    assert any("histogram" in value for value in rows["qat/gradients/fc1"])


@pytest.mark.skipif(find_spec("mlflow") is None, reason="pip install 'mqat[mlflow]'")
def test_mlflow_keeps_metrics_parameters_and_how_it_ended(tmp_path):
    from mlflow import MlflowClient

    asked = config(
        tmp_path, "exp_manager.create_mlflow_logger=true", "exp_manager.create_tensorboard_logger=false",
        "exp_manager.mlflow_logger_kwargs.tags={team: x}", "model.optim.lr=0.25",
    )  # fmt: skip
    with (
        pytest.raises(KeyError),
        RunLog(tmp_path, enabled=True, loggers=open_loggers(asked, tmp_path)) as log,
    ):
        log.metrics("qat", 1, VALUES)
        raise KeyError
    identity = json.loads((tmp_path / "loggers.json").read_text())["mlflow"]
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    assert client.get_run(identity).info.status == "FAILED"
    with RunLog(tmp_path, enabled=True, loggers=open_loggers(asked, tmp_path)) as log:
        log.metrics("qat", 2, VALUES | {"loss": 2.0})
    run = client.get_run(identity)
    assert run.info.status == "FINISHED" and run.data.tags["team"] == "x"
    assert run.data.params["model.optim.lr"] == "0.25"
    found = client.get_metric_history(identity, "qat/loss")
    assert [(metric.step, metric.value) for metric in found] == [(1, 2.5), (2, 2.0)]

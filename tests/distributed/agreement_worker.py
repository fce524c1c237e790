"""Run by torchrun on two ranks that differ in something; writes what each of them makes of it."""

import json
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from mqat.errors import UserError
from mqat.runtime import groups
from mqat.runtime.groups import command_line
from tests.unit.model_fixtures import MODEL, microbatches


def poisoned_step(tensor_parallel: int, pipeline_parallel: int) -> str:
    """Message of a step whose gradient is NaN in one linear, on the last rank only."""
    groups.initialize(tensor_parallel=tensor_parallel, pipeline_parallel=pipeline_parallel)
    from megatron.core import parallel_state

    from mqat.checkpoints.pretrained import load_pretrained_
    from mqat.checkpoints.random_weights import RandomWeights
    from mqat.config import ModelConfig, OptimizerConfig
    from mqat.specs.model import build_model
    from mqat.training.gradients import nonfinite_gradients
    from mqat.training.optimizer import build_optimizer, prepare_gradients, wrap_for_training
    from mqat.training.step import forward_backward

    settings = ModelConfig(
        tensor_model_parallel_size=tensor_parallel, pipeline_model_parallel_size=pipeline_parallel
    )
    chunks = build_model(MODEL, settings, {}, torch.float32)
    load_pretrained_(chunks, RandomWeights(MODEL, 1, 0.1))
    chunks = wrap_for_training(chunks)
    optimizer, _ = build_optimizer(chunks, OptimizerConfig(lr=1e-3), max_steps=2, clip_grad=1.0)
    if dist.get_rank() == 1:
        linear = chunks[0].module.decoder.layers[-1].mlp.linear_fc2
        linear.weight.register_hook(lambda gradient: gradient * torch.nan)
    forward_backward(chunks, microbatches())
    norm, names = prepare_gradients(optimizer), nonfinite_gradients(chunks)
    parallel_state.destroy_model_parallel()  # the next layout has other groups of this world
    return f"{norm} {names}"


def broken_saves(directory: Path) -> dict[str, tuple[str, str]]:
    """What each rank raises when one of them cannot write, and when the program fails on one."""
    from mqat.checkpoints.dist_checkpoint import _writing

    full = OSError(28, "No space left on device")
    wrapped = {name: CheckpointException("", {1: (error, None)})
               for name, error in (("disk", full), ("fault", TypeError("a fault")))}  # fmt: skip
    errors = {
        "disk": full, "wrapped disk": wrapped["disk"],
        "fault": TypeError("a fault"), "wrapped fault": wrapped["fault"],
        "shape": RuntimeError("size mismatch"),
    }  # fmt: skip
    found = {}
    for name, error in errors.items():
        try:
            with _writing(directory / "step_1", directory / ".step_1.tmp"):
                if dist.get_rank() == 1:
                    raise error
        except (Exception, CheckpointException) as caught:
            found[name] = (type(caught).__name__, str(caught))
    return found


def dtypes(directory: Path) -> tuple[str, str]:
    """dtype of the model, and of what this rank would have chosen alone, where machines differ."""
    groups.initialize()
    from mqat.config import load_config
    from mqat.plan import run
    from mqat.training import session

    run.has_bf16_units = lambda device: dist.get_rank() == 0
    config = load_config(None, [
        "model.architecture={vocab_size: 300, hidden_size: 64, intermediate_size: 128, num_layers: 1,"
        "num_attention_heads: 4, num_query_groups: 2}",
        "model.data.packaged=python_docs", "model.data.seq_length=32",
        "model.global_batch_size=4", "quantization.num_calib_size=4", "quantization.algorithm=null",
        "export.format=null",
        "exp_manager.create_tensorboard_logger=false", f"exp_manager.exp_dir={directory}",
    ])  # fmt: skip
    plan = run.make_plan(config)
    opened = session.open_session(plan)
    with opened.log:
        return str(next(opened.chunks[0].parameters()).dtype), str(plan.dtype)


def unwritable_quality_report(directory: Path) -> str:
    """What each rank raises when the first cannot write the report."""
    from types import SimpleNamespace

    from mqat.training import session

    session.quality_report = lambda *_, **__: {"linears": []}

    def write_report(*_: object, **__: object) -> None:
        raise UserError("the report cannot be written")

    session.write_run_quality = write_report
    session.about_quality = lambda *_: {}
    run = SimpleNamespace(
        validation=SimpleNamespace(epoch=list), chunks=[],
        plan=SimpleNamespace(
            run_dir=directory, config=SimpleNamespace(quantization=SimpleNamespace(algorithm="int8"))
        ),
    )  # fmt: skip
    with pytest.raises(UserError) as raised:
        session.Session.report_quality(run)
    return str(raised.value)


def main() -> None:
    out = Path(sys.argv[1])
    groups.join("nccl" if torch.cuda.is_available() else "gloo")
    found = {
        layout: poisoned_step(*sizes)
        for layout, sizes in {"tp": (2, 1), "pp": (1, 2), "dp": (1, 1)}.items()
    } | {"saves": broken_saves(out), "dtypes": dtypes(out / "run")}
    found["report"] = unwritable_quality_report(out)
    (out / f"rank{dist.get_rank()}.json").write_text(json.dumps(found))
    groups.finalize()


if __name__ == "__main__":
    with command_line():
        main()

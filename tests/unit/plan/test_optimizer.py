"""Optimizers that cannot be sharded are refused by name, for a reason that holds."""

import pytest
import torch

from mqat.config import OptimizerConfig, load_config
from mqat.errors import UserError
from mqat.plan.optimizer import check_optimizer
from mqat.plan.run import make_plan


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        (
            {"name": "adamw_8bit"},
            "torchao's and bitsandbytes' 8-bit AdamW are none of these.*Use adamw",
        ),
        ({"name": "paged_adamw_8bit"}, "blocks of 256 elements"),
        ({"name": "muon"}, "Megatron's Muon refuses the distributed optimizer"),
        ({"name": "sgd"}, "takes torch's AdamW"),
        ({"name": "distributed_fused_adam"}, "is called adamw here"),
        ({"name": "adamw_8bits"}, "did you mean 'adamw_8bit'"),
        ({"exp_avg_dtype": "bfloat16"}, "exp_avg_dtype=bfloat16: Megatron's precision-aware"),
        ({"exp_avg_sq_dtype": "float8"}, "exp_avg_sq_dtype='float8' is not one of: float32"),
        ({"optimizer_cpu_offload": True}, "does not save and reshard yet"),
    ],
)
def test_what_cannot_be_sharded_or_run_is_refused(settings, match, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=match):
        check_optimizer(OptimizerConfig(**settings))
    check_optimizer(OptimizerConfig())  # control


def test_a_run_is_refused_before_it_starts():
    with pytest.raises(UserError, match=r"model\.optim\.name=muon"):
        make_plan(load_config(None, ["model.optim.name=muon"]), world_size=1)


@pytest.mark.parametrize("package", ["torchao.optim", "bitsandbytes.optim"])
def test_eight_bit_optimizers_are_none_that_the_distributed_optimizer_takes(package):
    module = pytest.importorskip(package, reason=f"{package} is not installed")
    assert not issubclass(module.AdamW8bit, torch.optim.Adam | torch.optim.AdamW)


def test_muon_and_the_distributed_optimizer_exclude_each_other():
    """What the refusal says of Megatron's own code."""
    from pathlib import Path

    import megatron.core.optimizer as package

    folder = Path(package.__file__).parent
    sources = [path.read_text("utf-8") for path in folder.glob("*.py")]
    assert any("emerging_optimizers" in source for source in sources)
    assert any("is not supported" in s and "muon" in s.lower() for s in sources)


def test_moments_in_bfloat16_are_asked_of_megatron():
    from mqat.training.optimizer import _moments

    assert _moments(OptimizerConfig()) == {}
    assert _moments(OptimizerConfig(exp_avg_sq_dtype="bfloat16")) == {
        "use_precision_aware_optimizer": True,
        "exp_avg_dtype": torch.float32,
        "exp_avg_sq_dtype": torch.bfloat16,
    }

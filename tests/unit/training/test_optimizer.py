"""The learning rate of each parameter group."""

import pytest

from mqat.config import OptimizerConfig, QuantizationConfig, SchedulerConfig


@pytest.mark.parametrize("lsq_lr", [1e-6, 1e-3, 1e-1])
def test_every_group_warms_up_to_its_own_rate(calibrated, lsq_lr):
    from mqat.parallel.learned_scales import learn_scales_
    from mqat.training.optimizer import build_optimizer, wrap_for_training

    chunks = [chunk.module for chunk in calibrated("int8")]
    learn_scales_(chunks, weights="lsq", inputs="pact")
    optimizer, scheduler = build_optimizer(
        wrap_for_training(chunks),
        OptimizerConfig(lr=1e-3, sched=SchedulerConfig("constant", warmup_steps=3)),
        max_steps=8, clip_grad=1.0, scales=QuantizationConfig(lsq_lr=lsq_lr),
    )  # fmt: skip
    groups = optimizer.param_groups
    assert len({group["max_lr"] for group in groups}) > 1  # control: PACT's is another in any case
    for step in range(6):
        share = min(step + 1, 4) / 4
        shares = [group["lr"] / group["max_lr"] for group in groups]
        assert shares == pytest.approx([share] * len(groups))
        scheduler.step(1)

"""What a run says of itself beside its figures: for `summary.json`, its pages and TensorBoard."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from datetime import date
from importlib.metadata import version
from typing import Any

from omegaconf import OmegaConf

import mqat
from mqat.config import RunConfig
from mqat.data.loader import Batches
from mqat.plan.run import RunPlan, describe


def about_run(plan: RunPlan) -> dict[str, Any]:
    """Model, text, layout, algorithm, versions and day, in the order in which a page shows them."""
    settings, trainer = plan.config.model, plan.config.trainer
    model = plan.model
    start = settings.restore_from_path or settings.packaged or "random weights"
    data = settings.data.packaged or ", ".join(map(str, settings.data.train))
    return {
        "model": f"{model.family}, {model.num_layers} layers of {model.hidden_size}, from {start}",
        "text": data,
        **describe(plan),
        "training": f"{trainer.max_steps} steps of {settings.global_batch_size} x "
        f"{settings.data.seq_length} tokens, learning rate {settings.optim.lr:g}",
        "versions": f"mqat {mqat.__version__}, megatron-core {version('megatron-core')}, torch "
        f"{version('torch')}",
        "date": date.today().isoformat(),
    }


def about_quality(plan: RunPlan, validation: Batches, is_trained: bool) -> dict[str, Any]:
    """Of a quality report: what was measured on what, and what had been done (`report.advice.hint`)."""
    settings, data = plan.config.quantization, plan.config.model.data
    held_out = validation.data
    inputs = held_out.tokens[:, :-1]
    real = inputs.numel() if held_out.segments is None else int((held_out.segments >= 0).sum())
    return {
        "algorithm": settings.algorithm or "rules",
        "checkpoint": str(plan.run_dir),
        "stage": "after QAT" if is_trained else "after calibration",
        "text": f"held out of {data.packaged}" if data.packaged else ", ".join(data.validation),
        "tokens": real,
        "date": date.today().isoformat(),
        "calibrator": settings.calibrator,
        "recipes": {name: asdict(recipe) for name, recipe in plan.recipes.items()},
        "is_trained": is_trained,
    }


def flat_settings(config: RunConfig) -> dict[str, Any]:
    """`section.key` -> value, of everything that can be set."""
    return dict(_flat(OmegaConf.to_container(OmegaConf.structured(config)), ""))


def _flat(values: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value

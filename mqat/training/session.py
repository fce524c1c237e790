"""A run in progress: the model on this rank, its data, and what has been measured so far.

`summary.json` grows phase by phase and is the record that a resumed run continues from.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron.core import parallel_state

from mqat.calibration.calibrate import calibrate
from mqat.calibration.idle_experts import MIN_TOKENS
from mqat.calibration.weight_recipe import apply_weight_recipe_
from mqat.checkpoints.dist_checkpoint import (
    TrainingState,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from mqat.checkpoints.packed_backbone import load_packed_
from mqat.checkpoints.pretrained import load_pretrained_
from mqat.data.dataset import load_run_data
from mqat.data.loader import Batches
from mqat.errors import UserError
from mqat.evaluation.cached import keeps_past
from mqat.evaluation.forward import evaluate, run_layers
from mqat.evaluation.generation import Limits, generate
from mqat.evaluation.quality import quality_report
from mqat.evaluation.text_model import MegatronText
from mqat.evaluation.verification import record_logits
from mqat.files import write_json
from mqat.parallel.add_adapters import adapters_of, add_adapters_, merge_adapters_
from mqat.parallel.divergence import DistillationLoss
from mqat.parallel.learned_scales import learn_scales_
from mqat.parallel.low_precision_backward import set_backward_
from mqat.parallel.quantized_module import all_quantizers, unwrapped
from mqat.plan.origin import Origin
from mqat.plan.run import RunPlan, describe
from mqat.plan.teacher import check_same_tokens
from mqat.quant.algorithm import Recipe
from mqat.report.page import write_run_quality
from mqat.report.run_page import MODELS
from mqat.runtime.groups import any_rank, decided_by_main, is_main, on_all_ranks
from mqat.runtime.interruption import ends_at_once
from mqat.specs.model import build_model, padded_vocab_size
from mqat.specs.transformer_engine import core_attention
from mqat.training.about import about_quality, about_run, flat_settings
from mqat.training.distillation import Teacher
from mqat.training.log import RunLog
from mqat.training.loggers import open_loggers
from mqat.training.loop import Phase, train_phase
from mqat.training.optimizer import build_optimizer, wrap_for_training
from mqat.training.profiling import ProfiledSteps
from mqat.training.run_directory import open_run_directory
from mqat.training.run_lock import lock_run_directory


@dataclass
class Session:
    """Built by `open_session`; the recipes in `recipes.py` are sequences of its methods."""

    plan: RunPlan
    log: RunLog
    chunks: list[Any]
    tokenizer: Any
    train: Batches
    validation: Batches
    summary: dict[str, Any] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)

    @property
    def checkpoints(self) -> Path:
        """Directory of intermediate checkpoints."""
        return self.plan.run_dir / "checkpoints"

    def is_done(self, step: str) -> bool:
        """Whether an earlier, interrupted run already finished this step."""
        return step in self.summary["done"]

    def finish(self, step: str) -> None:
        """Records a finished step on disk."""
        self.summary["done"].append(step)
        self.write_summary()

    def end(self) -> None:
        """Records that the run has come to its end."""
        self.summary["finished"] = True
        self.write_summary()
        self.log.hyperparameters(flat_settings(self.plan.config), self.summary["ppl"])

    def write_summary(self) -> None:
        """Writes `summary.json` atomically, from the first rank."""
        self.summary["seconds"] = round(
            self.summary.get("seconds_before", 0.0) + time.perf_counter() - self.started, 1
        )
        if is_main():
            write_json(self.plan.run_dir / "summary.json", self.summary)

    def restore_source(self) -> None:
        """(Re)loads the weights the run starts from; scales are the run's own, found by `calibrate`."""
        for adapter in adapters_of(self.chunks).values():
            adapter.reset_()
        _load_weights_(self.chunks, self.plan.source, self.plan)

    def restore(self, path: Path) -> None:
        """Loads a checkpoint of this run."""
        load_checkpoint(path, self.chunks, layers=self.plan.layers, adapters=self.plan.adapters)

    def save(self, path: Path, training: TrainingState | None = None) -> None:
        """Writes a checkpoint."""
        save_checkpoint(
            path,
            self.chunks,
            model=self.plan.model,
            layers=self.plan.layers,
            algorithm=self.plan.config.quantization.algorithm,
            tokenizer=self.tokenizer,
            training=training,
            recorded=record_logits(self.chunks, self.plan.model),
            adapters=self.plan.adapters if adapters_of(self.chunks) else None,
        )

    def merge_adapters(self) -> None:
        """Where merged adapters are served, makes them part of the weights for good."""
        if self.plan.adapters is not None and self.plan.adapters.is_merged:
            merge_adapters_(self.chunks)

    def reset_quantizers(self) -> None:
        """Forgets all scales: the model computes unquantized."""
        for quantizer in all_quantizers(self.chunks):
            quantizer.reset()

    def validation_loss(self) -> float:
        """Loss per token on the held-out data."""
        loss, tokens = evaluate(self.chunks, self.validation.epoch())
        if tokens == 0:
            raise UserError(
                "validation: the held-out data has no token that counts; name other files in "
                "model.data.validation, or raise trainer.limit_val_samples."
            )
        return loss / tokens

    def measure(self, name: str) -> None:
        """Perplexity, loss and greedy samples of the present model, into the summary."""
        with ends_at_once("evaluation"):
            self._measure(name)

    def _measure(self, name: str) -> None:
        loss = self.validation_loss()
        self.summary["loss"][name] = loss
        self.summary["ppl"][name] = math.exp(min(loss, 700.0))
        answers: dict[str, str] = {}
        manager = self.plan.config.exp_manager
        prompts = [list(self.tokenizer(prompt)["input_ids"]) for prompt in manager.sample_prompts]
        if prompts:
            model, limits = MegatronText(self.chunks, self.tokenizer), Limits(manager.sample_tokens)
            found, _ = generate(model, prompts, limits, cached=keeps_past(self.chunks))
            answers = {p: a.text for p, a in zip(manager.sample_prompts, found, strict=True)}
            for prompt, text in answers.items():
                self.summary["samples"].setdefault(prompt, {})[name] = text
        self.log.measured(name, loss, self.summary["ppl"][name], answers)
        perplexity = self.summary["ppl"][name]
        self.log.say(
            f"  {MODELS[name]:>29}: validation loss {loss:.4f}, perplexity {perplexity:.2f}"
        )

    def _calibration_pass(self) -> Callable[[], None]:
        settings = self.plan.config.quantization
        choose = self.train.spread if settings.calib_spread else self.train.first
        steps = choose(settings.num_calib_size)
        return lambda: run_layers(self.chunks, steps)

    def calibrate(self, recipes: Mapping[str, Recipe] | None = None) -> None:
        """Carries out recipes if there are any, observes inputs, and freezes every scale."""
        with ends_at_once("calibration"):
            self._calibrate(recipes)

    def _calibrate(self, recipes: Mapping[str, Recipe] | None) -> None:
        settings = self.plan.config.quantization
        self.reset_quantizers()
        group = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
        run_batches = self._calibration_pass()
        weight_qparams, unseen = None, list[str]()
        if recipes is not None:
            weight_qparams, unseen = apply_weight_recipe_(
                self.chunks,
                run_batches,
                recipes,
                model=self.plan.model,
                calib_layers_at_once=settings.calib_layers_at_once,
                group=group,
                dp_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
            )
        idle = calibrate(
            self.chunks,
            run_batches,
            group=group,
            method=settings.calibrator,
            percentile=settings.percentile,
            input_headroom=settings.input_headroom,
            weight_qparams=weight_qparams,
        )
        self.summary["idle_experts"] = idle = sorted({*idle, *unseen})
        if idle:
            self.log.say(
                f"  {len(idle)} linears of experts saw fewer than {MIN_TOKENS} calibration tokens (a "
                "static input takes the largest scale of its layer, a recipe rounds the weight to "
                "nearest): "
                f"{', '.join(idle[:4])}{' ...' if idle[4:] else ''}"
            )

    def report_quality(self, *, is_trained: bool = False) -> None:
        """Writes `quality/` of the quantized model on the held-out data.

        `quality.json` is of calibration, `quality_qat.json` of QAT; the page shows both.
        """
        group = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
        steps = self.validation.epoch()
        report = quality_report(self.chunks, lambda: run_layers(self.chunks, steps), group=group)
        with on_all_ranks():
            if is_main():
                report |= {"about": about_quality(self.plan, self.validation, is_trained)}
                write_run_quality(report, self.plan.run_dir / "quality", is_trained=is_trained)

    def teacher(self, start: Path | None) -> Teacher | None:
        """Whom `quantization.distill` names, by default the unquantized weights QAT starts from.

        `start`: the run's own checkpoint of those; None: they are the source's.
        """
        distill = self.plan.config.quantization.distill
        if distill is None:
            return None
        model, origin = self.plan.teacher or (self.plan.model, start or self.plan.source)
        chunks = build_model(
            model,
            self.plan.config.model,
            {},
            self.plan.dtype,
            table_rows=padded_vocab_size(self.plan.model),
        )
        _load_weights_(chunks, origin)
        loss = DistillationLoss(
            distill.divergence, distill.weight, distill.temperature, distill.top_k
        )
        return Teacher(
            chunks,
            loss,
            hidden_weight=distill.hidden_weight,
            is_offloaded=distill.offload_teacher,
        )

    def train_phase(
        self, phase: Phase, *, lr: float | None = None, teacher: Teacher | None = None
    ) -> None:
        """Trains the present weights, or resumes this phase from its latest checkpoint."""
        config = self.plan.config
        optimizer, scheduler = build_optimizer(
            self.chunks,
            config.model.optim,
            max_steps=phase.max_steps,
            clip_grad=config.trainer.gradient_clip_val,
            lr=lr,
            scales=config.quantization,
        )
        state = TrainingState(optimizer, scheduler)
        directory = self.checkpoints / phase.name
        latest = latest_checkpoint(directory)  # none of a run that was put aside
        if latest is not None:
            load_checkpoint(
                latest, self.chunks, layers=self.plan.layers, training=state,
                adapters=self.plan.adapters,
            )  # fmt: skip
            self.log.say(f"  {phase.name}: resumed from {latest}")
        with on_all_ranks():
            self.log.drop_steps_after(phase.name, state.step)
        best = train_phase(
            phase,
            self.chunks,
            state,
            self.train,
            self.log,
            validate=self.validation_loss,
            save=lambda path: self.save(path, state),
            directory=directory,
            teacher=teacher,
            profiled=ProfiledSteps(
                config.exp_manager.profile, self.plan.run_dir / "profile", phase.name
            ),
        )
        batch_tokens = self.train.global_batch_size * config.model.data.seq_length
        self.summary["tokens"][phase.name] = state.step * batch_tokens
        if best is not None:
            self.restore(best)


def _load_weights_(chunks: list[Any], origin: Origin, plan: RunPlan | None = None) -> None:
    """Into chunks with adapters and packed weights as planned; None: with neither."""
    compresses = plan is not None and plan.config.quantization.compress
    if isinstance(origin, Path):
        layers = plan.layers if plan is not None and compresses else {}
        load_checkpoint(origin, chunks, layers=layers, adapters=plan.adapters if plan else None)
        return
    with on_all_ranks():
        load_pretrained_(unwrapped(chunks), origin)
        if compresses:
            load_packed_(unwrapped(chunks), origin)


def open_session(plan: RunPlan) -> Session:
    """Creates the run directory, loads data and weights, and wraps the model for training.

    Process groups must exist. Every error is raised on all ranks.
    """
    config = plan.config
    with on_all_ranks():
        data = load_run_data(
            config.model.data,
            model=plan.model,
            source=None if isinstance(plan.source, Path) else plan.source.tokenizer_source,
            checkpoint=plan.source if isinstance(plan.source, Path) else None,
        )

        if plan.teacher is not None:
            check_same_tokens(plan.teacher[1], data.tokenizer.get_vocab())

    def take_directory() -> tuple[dict[str, Any], list[str]]:
        lock_run_directory(plan.run_dir)
        return open_run_directory(plan.run_dir, config)

    # Every rank knows afterwards that the directory exists.
    summary, said = decided_by_main(take_directory)
    with on_all_ranks():
        log = RunLog(
            plan.run_dir,
            enabled=is_main(),
            loggers=open_loggers(config, plan.run_dir) if is_main() else (),
        )
    log.say("  ".join(f"{key}: {value}" for key, value in describe(plan).items()))
    for line in said:
        log.say(line)
    # The model has one dtype; machines may differ in what `auto` means on them.
    dtype = decided_by_main(lambda: plan.dtype)
    if any_rank(plan.dtype != dtype):
        log.say(
            f"precision: auto differs between the machines; all compute in {dtype}, the first's"
        )
    plan = replace(plan, dtype=dtype)
    log.say(data.description)
    with on_all_ranks():
        if config.model.transformer_engine:
            core_attention()  # or one rank without it would leave the others waiting
    built = build_model(
        plan.model, config.model, plan.layers, plan.dtype,
        is_packed=config.quantization.compress,
    )  # fmt: skip
    learn_scales_(
        built,
        weights=config.quantization.weight_rule,
        inputs=config.quantization.input_rule,
    )
    set_backward_(built, config.quantization.backward, seed=config.trainer.seed)
    if plan.adapters is not None:
        add_adapters_(built, plan.adapters, seed=config.trainer.seed)
    chunks = wrap_for_training(built, config.model.ddp)
    layout = {
        "micro_batch_size": config.model.micro_batch_size,
        "dp_rank": parallel_state.get_data_parallel_rank(),
        "dp_size": plan.data_parallel,
        "seed": config.trainer.seed,
    }
    batch = config.model.global_batch_size
    session = Session(
        plan=plan,
        log=log,
        chunks=chunks,
        tokenizer=data.tokenizer,
        train=Batches(data.train, global_batch_size=batch, shuffle=True, **layout),
        validation=Batches(
            data.validation.subset(config.trainer.limit_val_samples),
            global_batch_size=batch,
            shuffle=False,
            **layout,
        ),
        summary=summary,
    )
    session.summary["about"] = about_run(plan)
    session.restore_source()
    return session

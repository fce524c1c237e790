"""The three recipes behind the examples: SFT, PTQ, and the whole QAT story.

Each takes a validated plan, runs under torchrun at any layout, and leaves the run directory that
design documents: config, metrics, summary, checkpoints, and the exported model.
"""

import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist
from rich.table import Table

from mqat.config import RunConfig
from mqat.errors import UserError
from mqat.evaluation.verification import verify_adapter_with_model, verify_with_model
from mqat.experiment_config import ExperimentConfig
from mqat.export.export import export_checkpoint
from mqat.export.exporter import Exporter, ExportOptions
from mqat.export.exporters import exporter
from mqat.plan.run import RunPlan, export_options, make_plan
from mqat.report.run_page import MODELS
from mqat.runtime import groups
from mqat.runtime.groups import is_main, on_all_ranks, raise_on_any_rank
from mqat.runtime.interruption import ends_at_once
from mqat.training.loop import Phase
from mqat.training.schedule import QuantizerSchedule
from mqat.training.session import Session, open_session
from mqat.training.validation import ValidationRules
from mqat.verify.report import Report

# Perplexities of a few thousand held-out tokens move by about this much with the seed.
SMALLEST_GAP = 0.005


def _start(
    config: RunConfig, command: str, *, quantizes: bool, can_distil: bool = False
) -> Session:
    config = replace(config, command=command)
    if config.quantization.distill is not None and not can_distil:
        raise UserError(
            "config: quantization.distill: only QAT has a teacher (mqat qat, examples/gpt_qat.py, "
            "examples/gpt_qad.py); leave it out here."
        )
    if config.quantization.compress and not can_distil:
        raise UserError(
            "config: quantization.compress: packs the weights under adapters (mqat lora, mqat qat); "
            "leave it out here."
        )
    if config.model.peft is not None and command == "ptq":
        raise UserError(
            "config: model.peft: ptq trains nothing, so adapters would stay zero; leave it out, or use "
            "mqat lora."
        )
    plan = make_plan(config)
    if quantizes and not plan.layers:
        raise UserError(
            "quantization.algorithm=null and no rule quantizes anything; choose an algorithm, or run "
            "examples/gpt_sft.py for unquantized training."
        )
    settings = config.model
    if config.trainer.deterministic:
        groups.make_deterministic()
    groups.initialize(
        tensor_parallel=settings.tensor_model_parallel_size,
        pipeline_parallel=settings.pipeline_model_parallel_size,
        virtual_pipeline=settings.virtual_pipeline_model_parallel_size,
        context_parallel=settings.context_parallel_size,
        expert_parallel=settings.expert_model_parallel_size,
        expert_tensor_parallel=settings.expert_tensor_parallel_size,
        seed=config.trainer.seed,
    )
    return open_session(plan)


def _phase(plan: RunPlan, name: str, max_steps: int, *, quantized: bool) -> Phase:
    config = plan.config
    settings = config.quantization
    schedule = QuantizerSchedule(
        settings.fake_quant_after_n_steps,
        settings.inputs_after_n_steps,
        [(first, bits) for first, bits in settings.bit_schedule],
    )
    return Phase(
        name,
        max_steps,
        schedule=schedule if quantized else QuantizerSchedule(),
        val_check_interval=config.trainer.val_check_interval,
        log_every_n_steps=config.trainer.log_every_n_steps,
        checkpoint_interval=config.exp_manager.checkpoint_interval,
        checkpoint_minutes=config.exp_manager.checkpoint_minutes,
        keep_last=config.exp_manager.keep_last,
        keeps_last_state=config.exp_manager.keeps_last_state and name != "pretrain",
        validation=_validation_rules(config.exp_manager),
        offloads_activations=config.model.cpu_offloading,
        histogram_every_n_steps=config.exp_manager.histogram_every_n_steps,
    )


def _validation_rules(manager: ExperimentConfig) -> ValidationRules:
    stopping = manager.early_stopping_callback_params
    return ValidationRules(
        manager.checkpoint_callback_params.save_top_k,
        stopping.patience if manager.create_early_stopping_callback else None,
        stopping.min_delta,
    )


def _pretrain(session: Session) -> Path | None:
    """Unquantized training of a model that starts from random weights; returns its checkpoint."""
    settings = session.plan.config.model.pretrain
    if settings.max_steps == 0:
        return None
    path = session.checkpoints / "pretrained"
    if session.is_done("pretrain"):
        session.restore(path)
        return path
    session.train_phase(
        _phase(session.plan, "pretrain", settings.max_steps, quantized=False), lr=settings.lr
    )
    session.save(path)
    session.finish("pretrain")
    return path


def _back_to_start(session: Session, pretrained: Path | None) -> None:
    session.reset_quantizers()
    if pretrained is None:
        session.restore_source()
    else:
        session.restore(pretrained)


def _export(checkpoint: Path, out: Path, target: Exporter, options: ExportOptions) -> None:
    """Exports on all ranks in parallel."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*its adapters are not part")  # written beside
        export_checkpoint(
            target,
            checkpoint,
            out,
            options,
            overwrite=True,
            rank=dist.get_rank(),
            world_size=dist.get_world_size(),
            raise_on_any_rank=raise_on_any_rank,
        )


def _export_adapter(session: Session, checkpoint: Path, base: Path | None) -> None:
    """Adapters that are served beside the weights; run on `base`, a Hugging Face directory, if any."""
    adapters, export = session.plan.adapters, session.plan.config.export
    if adapters is None or adapters.is_merged:
        return
    target = exporter("peft")
    out = session.plan.run_dir / target.output_name
    _export(checkpoint, out, target, ExportOptions(dtype=export.dtype))
    session.summary["adapter"] = {"path": str(out), "verified": False}
    if export.verify:
        tokens = session.validation.sample_tokens(rows=2, length=64)
        report = verify_adapter_with_model(
            out, base, checkpoint, session.chunks, tokens, export.dtype
        )
        _say_verified(session, "adapter", out, report)


def _say_verified(session: Session, key: str, out: Path, report: Report) -> None:
    with on_all_ranks():
        if is_main():
            session.summary[key] |= report.to_dict() | {"verified": report.ok}
            session.log.say(f"  {key}: {report.headline()}")
            if not report.ok:
                raise UserError(f"{out}: verification failed: {report.problems[:3]}")


def _export_and_verify(session: Session, checkpoint: Path) -> None:
    """Exports on all ranks in parallel, then checks the files against the checkpoint."""
    with ends_at_once("the export"):
        _export_as_configured(session, checkpoint)


def _export_as_configured(session: Session, checkpoint: Path) -> None:
    export = session.plan.config.export
    if export.format in (None, "peft"):
        if export.format == "peft":
            _export_adapter(session, checkpoint, None)
            session.write_summary()
        return
    target = exporter(export.format, export.style)
    out = Path(export.save_path) if export.save_path else session.plan.run_dir / target.output_name
    _export(checkpoint, out, target, export_options(export))
    session.summary["export"] = {"path": str(out), "verified": False}
    if export.verify and target.is_served:
        tokens = session.validation.sample_tokens(rows=2, length=64)
        report = verify_with_model(
            out, checkpoint, session.chunks, tokens, export.dtype, is_rebuilt=False
        )
        _say_verified(session, "export", out, report)
    _export_adapter(session, checkpoint, out if target.format == "hf" else None)
    session.write_summary()


def gap_recovered(ppl: Mapping[str, float], *, is_taught: bool = False) -> float | None:
    """Share of PTQ's loss of perplexity that QAT makes good.

    Compared with the model fine-tuned alike, where there is one and the labels are what QAT learns
    (`is_taught`: it learns from a teacher alone). None without one of the three, and where PTQ
    loses less than `SMALLEST_GAP` of the perplexity: a ratio of two noises says nothing.
    """
    if not {"bf16", "ptq", "qat"} <= ppl.keys():
        return None
    target = ppl["bf16"] if is_taught else ppl.get("bf16_finetuned", ppl["bf16"])
    gap = ppl["ptq"] - target
    return (ppl["ptq"] - ppl["qat"]) / gap if gap > SMALLEST_GAP * target else None


def _report(session: Session) -> None:
    """Gap recovered, and the table people look at."""
    ppl = session.summary["ppl"]
    distill = session.plan.config.quantization.distill
    is_taught = distill is not None and distill.weight == 1
    session.summary["gap_recovered"] = gap_recovered(ppl, is_taught=is_taught)
    plan = session.plan
    by_rules = plan.config.quantization.algorithm or "quantized by rules"
    title = by_rules if plan.layers else "unquantized"
    table = Table(title=f"{title}: held-out perplexity")
    table.add_column("model")
    table.add_column("perplexity", justify="right")
    for key, title in MODELS.items():
        if key in ppl:
            table.add_row(title, f"{ppl[key]:.2f}")
    session.log.console.print(table)
    share = session.summary["gap_recovered"]
    if share is not None:
        session.log.say(f"share of the PTQ gap recovered by QAT: {share:.1%}")
    elif {"bf16", "ptq", "qat"} <= ppl.keys():
        session.log.say(
            f"PTQ loses nothing measurable (less than {SMALLEST_GAP:.1%} of the perplexity it is "
            "compared with), so QAT has no gap to recover"
        )
    for prompt, answers in session.summary["samples"].items():
        session.log.say(f"\n{prompt!r}")
        for name, answer in answers.items():
            session.log.say(f"  {MODELS[name]:>29}: {answer!r}")
    session.end()


def _quantize(session: Session) -> None:
    """PTQ as users know it, then (if asked for) with weights prepared by a recipe."""
    session.calibrate()
    session.measure("ptq")
    recipes = session.plan.recipes
    if any(recipe.changes_anything for recipe in recipes.values()):
        session.calibrate(recipes)
        session.measure("ptq_prepared")
    if session.plan.config.exp_manager.quality_report:
        session.report_quality()


def run_sft(config: RunConfig) -> Path:
    """Unquantized fine-tuning, export, verification; returns the checkpoint."""
    session = _start(config, "sft", quantizes=False)
    with session.log:
        _pretrain(session)
        session.measure("bf16")
        session.train_phase(_phase(session.plan, "sft", config.trainer.max_steps, quantized=False))
        session.measure("bf16_finetuned")
        path = session.plan.run_dir / "checkpoint"
        session.merge_adapters()
        session.save(path)
        _export_and_verify(session, path)
        _report(session)
    groups.finalize()
    return path


def run_ptq(config: RunConfig) -> Path:
    """Calibration, checkpoint, export, verification; returns the checkpoint."""
    session = _start(config, "ptq", quantizes=True)
    with session.log:
        _pretrain(session)
        session.measure("bf16")
        _quantize(session)
        path = session.plan.run_dir / "checkpoint"
        session.save(path)
        _export_and_verify(session, path)
        _report(session)
    groups.finalize()
    return path


def run_qat(config: RunConfig) -> Path:
    """The whole story; returns the QAT checkpoint.

    Unquantized baseline (trained first when it starts from random weights) -> the same model
    fine-tuned unquantized, for a fair comparison -> PTQ -> QAT -> export -> verification.
    Each finished step is recorded, so that an interrupted run continues where it was.
    """
    session = _start(config, "qat", quantizes=True, can_distil=True)
    steps = config.trainer.max_steps
    if config.quantization.compress:
        return _train_on_packed(session)
    with session.log:
        pretrained = _pretrain(session)
        if not session.is_done("bf16"):
            session.measure("bf16")
            session.finish("bf16")
        if config.quantization.compare_with_finetuned and not session.is_done("baseline"):
            session.train_phase(_phase(session.plan, "baseline", steps, quantized=False))
            session.measure("bf16_finetuned")
            session.finish("baseline")
            _back_to_start(session, pretrained)
        calibrated = session.checkpoints / "ptq"
        if session.is_done("ptq"):
            session.restore(calibrated)
        else:
            _quantize(session)
            session.save(calibrated)
            session.finish("ptq")
        path = session.plan.run_dir / "checkpoint"
        if session.is_done("qat"):
            session.restore(path)
        else:
            session.train_phase(
                _phase(session.plan, "qat", steps, quantized=True),
                teacher=session.teacher(pretrained),
            )
            session.measure("qat")
            session.merge_adapters()
            if config.exp_manager.quality_report:
                session.report_quality(is_trained=True)
            session.save(path)
            session.finish("qat")
        _export_and_verify(session, path)
        _report(session)
    groups.finalize()
    return path


def _train_on_packed(session: Session) -> Path:
    """Adapters on a backbone that is packed from the start: there is no unquantized model to measure."""
    path = session.plan.run_dir / "checkpoint"
    with session.log:
        if not session.is_done("ptq"):
            session.measure("ptq")
            session.finish("ptq")
        if session.is_done("qat"):
            session.restore(path)
        else:
            phase = _phase(
                session.plan, "qat", session.plan.config.trainer.max_steps, quantized=True
            )
            session.train_phase(phase, teacher=session.teacher(None))
            session.measure("qat")
            session.save(path)
            session.finish("qat")
        _export_and_verify(session, path)
        _report(session)
    groups.finalize()
    return path


def run_lora(config: RunConfig) -> Path:
    """Adapters alone are trained, on a model that is quantized first or not; returns the checkpoint.

    `run_qat`, or without any quantization `run_sft`, which do the same where `model.peft` is set.
    """
    if config.model.peft is None:
        raise UserError(
            "config: model.peft is null, so that all weights would be trained; set "
            "model.peft.peft_scheme=lora, or use mqat qat or mqat sft."
        )
    settings = config.quantization
    is_quantized = settings.algorithm or settings.rules or settings.kv_cache
    return run_qat(config) if is_quantized else run_sft(config)

"""The three recipes behind the examples: SFT, PTQ, and the whole QAT story.

Each takes a validated plan, runs under torchrun at any layout, and leaves the run directory that
design documents: config, metrics, summary, checkpoints, and the exported model.
"""

from collections.abc import Mapping
from pathlib import Path

import torch.distributed as dist
from rich.table import Table

from mqat.config import RunConfig
from mqat.errors import UserError
from mqat.evaluation.verification import verify_with_model
from mqat.export.export import export_checkpoint
from mqat.export.exporters import exporter
from mqat.plan.run import RunPlan, export_options, make_plan
from mqat.runtime import groups
from mqat.runtime.groups import is_main, on_all_ranks, raise_on_any_rank
from mqat.training.loop import Phase
from mqat.training.schedule import QuantizerSchedule
from mqat.training.session import Session, open_session

# Perplexities of a few thousand held-out tokens move by about this much with the seed.
SMALLEST_GAP = 0.005


def _start(config: RunConfig, *, quantizes: bool, can_distil: bool = False) -> Session:
    if config.quantization.distill is not None and not can_distil:
        raise UserError(
            "config: quantization.distill: only QAT has a teacher (mqat qat, examples/gpt_qat.py, "
            "examples/gpt_qad.py); leave it out here."
        )
    plan = make_plan(config)
    if quantizes and not plan.layers:
        raise UserError(
            "quantization.algorithm=null and no rule quantizes anything; choose an algorithm, or run "
            "examples/gpt_sft.py for unquantized training."
        )
    settings = config.model
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


def _export_and_verify(session: Session, checkpoint: Path) -> None:
    """Exports on all ranks in parallel, then checks the files against the checkpoint."""
    export = session.plan.config.export
    if export.format is None:
        return
    target = exporter(export.format, export.style)
    out = Path(export.save_path) if export.save_path else session.plan.run_dir / target.output_name
    export_checkpoint(
        target,
        checkpoint,
        out,
        export_options(export),
        overwrite=True,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        raise_on_any_rank=raise_on_any_rank,
    )
    session.summary["export"] = {"path": str(out), "verified": False}
    if export.verify and target.is_served:
        tokens = session.validation.sample_tokens(rows=2, length=64)
        report = verify_with_model(
            out, checkpoint, session.chunks, tokens, export.dtype, is_rebuilt=False
        )
        with on_all_ranks():
            if is_main():
                session.summary["export"] |= report.to_dict() | {"verified": report.ok}
                session.log.say(f"  export: {report.headline()}")
                if not report.ok:
                    raise UserError(f"{out}: verification failed: {report.problems[:3]}")
    session.write_summary()


def gap_recovered(ppl: Mapping[str, float], *, is_taught: bool = False) -> float | None:
    """Share of PTQ's loss of perplexity that QAT makes good.

    Compared with the model fine-tuned alike, where there is one and the labels are what QAT learns
    (`is_taught`: it learns from a teacher alone). None without PTQ or QAT, and where PTQ
    loses less than `SMALLEST_GAP` of the perplexity: a ratio of two noises says nothing.
    """
    if not {"ptq", "qat"} <= ppl.keys():
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
    titles = {
        "bf16": "unquantized",
        "bf16_finetuned": "unquantized, fine-tuned alike",
        "ptq": "PTQ",
        "ptq_prepared": "PTQ with the recipe",
        "qat": "QAT",
    }
    plan = session.plan
    by_rules = "quantized by rules" if plan.layers else "unquantized"
    algorithm = plan.config.quantization.algorithm or by_rules
    table = Table(title=f"{algorithm}: held-out perplexity")
    table.add_column("model")
    table.add_column("perplexity", justify="right")
    for key, title in titles.items():
        if key in ppl:
            table.add_row(title, f"{ppl[key]:.2f}")
    session.log.console.print(table)
    share = session.summary["gap_recovered"]
    if share is not None:
        session.log.say(f"share of the PTQ gap recovered by QAT: {share:.1%}")
    elif "ptq" in ppl and "qat" in ppl:
        session.log.say(
            f"PTQ loses nothing measurable (less than {SMALLEST_GAP:.1%} of the perplexity it is "
            "compared with), so QAT has no gap to recover"
        )
    for prompt, answers in session.summary["samples"].items():
        session.log.say(f"\n{prompt!r}")
        for name, answer in answers.items():
            session.log.say(f"  {name:>16}: {answer!r}")
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
    session = _start(config, quantizes=False)
    with session.log:
        _pretrain(session)
        session.measure("bf16")
        session.train_phase(_phase(session.plan, "sft", config.trainer.max_steps, quantized=False))
        session.measure("bf16_finetuned")
        path = session.plan.run_dir / "checkpoint"
        session.save(path)
        _export_and_verify(session, path)
        _report(session)
    groups.finalize()
    return path


def run_ptq(config: RunConfig) -> Path:
    """Calibration, checkpoint, export, verification; returns the checkpoint."""
    session = _start(config, quantizes=True)
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
    session = _start(config, quantizes=True, can_distil=True)
    steps = config.trainer.max_steps
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
            session.save(path)
            session.finish("qat")
        _export_and_verify(session, path)
        _report(session)
    groups.finalize()
    return path

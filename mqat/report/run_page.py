"""A run as one HTML page: what was asked for, losses, perplexities, samples, and what was exported."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mqat.errors import UserError
from mqat.files import write_whole
from mqat.report.page import templates
from mqat.report.plots import COLOURS, check_plots, gradient_norms, loss_curves

# Models that a run measures, in the order in which it does: keys of `summary.json`, which NeMo's users
# know, and what people read. `bf16` is the model before quantization, in whatever precision it computes.
MODELS = {
    "bf16": "unquantized",
    "bf16_finetuned": "unquantized, fine-tuned alike",
    "ptq": "PTQ",
    "ptq_prepared": "PTQ with the recipe",
    "qat": "QAT",
}
_PHASES = {
    "pretrain": "unquantized, from random weights",
    "baseline": "unquantized, fine-tuned",
    "sft": "unquantized, fine-tuned",
    "qat": "QAT",
}
_FILES = ("config.yaml", "summary.json")


def is_run(path: Path) -> bool:
    """Whether a directory is that of a run (a checkpoint lies inside one)."""
    return all((path / name).is_file() for name in _FILES)


def _read_metrics(file: Path) -> dict[str, list[dict[str, Any]]]:
    """Phase -> its lines, in order; a last line that was cut off is left out.

    Raises:
        UserError: Another line is damaged.
    """
    phases: dict[str, list[dict[str, Any]]] = {}
    if not file.is_file():
        return phases
    lines = file.read_text("utf-8").splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        if not line.endswith("\n"):
            continue
        try:
            entry = json.loads(line)
            known = {key: entry[key] for key in ("phase", "step", "loss", "lr", "grad_norm")}
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file}:{number}: damaged ({error!r}); delete the line.") from error
        phases.setdefault(known["phase"], []).append(entry)
    return phases


def perplexity_rows(ppl: Mapping[str, float]) -> list[dict[str, Any]]:
    """A row for each model that was measured: perplexity, against unquantized, and length of a bar.

    Quantized models that were trained are compared with the unquantized one that was trained alike.
    """
    finite = [value for value in ppl.values() if math.isfinite(value)]
    rows = []
    for key, name in MODELS.items():
        if key not in ppl:
            continue
        against = "bf16_finetuned" if key == "qat" and "bf16_finetuned" in ppl else "bf16"
        base = ppl.get(against)
        rows.append({
            "name": name,
            "ppl": ppl[key],
            "change": None if base is None or key == against else ppl[key] / base - 1,
            "against": MODELS[against],
            "colour": COLOURS[key],
            "width": 100 * min(1.0, ppl[key] / max(finite, default=1.0)),
        })  # fmt: skip
    return rows


def verdict(summary: Mapping[str, Any]) -> str:
    """What a person wants to know first, in a sentence or two."""
    if not summary.get("finished", False):
        done = ", ".join(summary.get("done", [])) or "nothing"
        return f"This run has not come to its end; finished so far: {done}."
    share, ppl = summary.get("gap_recovered"), summary.get("ppl", {})
    if share is not None:
        against = "bf16_finetuned" if "bf16_finetuned" in ppl else "bf16"
        return (
            f"PTQ changes perplexity by {ppl['ptq'] / ppl['bf16'] - 1:+.1%}; QAT recovers {share:.1%} "
            f"of what it loses against the model that is {MODELS[against]}."
        )
    if {"ptq", "qat"} <= ppl.keys():
        return "PTQ loses nothing measurable here, so there is no gap for QAT to recover."
    return "This run has come to its end."


def run_page(run: Path) -> str:
    """The page of a run directory, finished or not; needs `check_plots`.

    Raises:
        UserError: Not a run, or a damaged file; names it.
    """
    if not is_run(run):
        missing = [name for name in _FILES if not (run / name).is_file()]
        raise UserError(f"{run}: not the directory of a run ({', '.join(missing)} is missing).")
    file = run / "summary.json"
    try:
        summary = json.loads(file.read_text("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: damaged ({error}).") from error
    metrics = _read_metrics(run / "metrics.jsonl")
    names = MODELS | _PHASES
    first = {key: lines for key, lines in metrics.items() if key == "pretrain"}
    others = {key: lines for key, lines in metrics.items() if key != "pretrain"}
    quality = run / "quality" / "quality.html"
    return (
        templates()
        .get_template("run.html.jinja")
        .render(
            title=f"Run {run.resolve().name}",
            verdict=verdict(summary),
            about=summary.get("about", {}),
            summary=summary,
            rows=perplexity_rows(summary.get("ppl", {})),
            models=MODELS,
            phases=_phase_rows(metrics),
            curves=loss_curves(others, summary.get("loss", {}), names) if others else "",
            norms=gradient_norms(others, names) if others else "",
            pretrain=loss_curves(first, {}, names) if first else "",
            config=(run / "config.yaml").read_text("utf-8"),
            quality="quality/quality.html" if quality.is_file() else None,
        )
    )


def _phase_rows(metrics: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Steps, speed and memory of each phase."""
    return [
        {
            "name": _PHASES.get(phase, phase),
            "steps": lines[-1]["step"],
            "loss": lines[-1]["loss"],
            "speed": sorted(e.get("tokens_per_second", math.nan) for e in lines)[len(lines) // 2],
            "memory": max(e.get("peak_memory_bytes", 0) for e in lines) / 2**30,
        }
        for phase, lines in metrics.items()
    ]


def write_run_page(run: Path, file: Path) -> None:
    """Writes the page, whole or not at all.

    Raises:
        UserError: As `run_page`; matplotlib is not installed.
    """
    check_plots()
    text = run_page(run)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, text)

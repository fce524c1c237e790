"""The quality report as files: `quality.json`, and one HTML page that needs nothing beside it."""

import base64
import io
import json
import os
from collections.abc import Iterable, Sequence
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mqat.errors import UserError

_LOW_DB = 20.0  # below this, a tenth of the output's amplitude is noise
_STYLE = """
body { font: 14px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 72em; padding: 0 1em }
table { border-collapse: collapse } td, th { padding: .2em .8em; border-bottom: 1px solid #ddd }
td { text-align: right } td:first-child { text-align: left; font-family: monospace }
tr.low { background: #fde8e4 } img { max-width: 100% } p.hint { color: #555 }
"""


def _db(value: float | None) -> str:
    return "exact" if value is None else f"{value:.1f}"


def _share(operand: dict[str, Any] | None) -> str:
    return "-" if operand is None else f"{100 * operand['clip_rate']:.3g}%"


def worst_first(linears: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """By the noise in the output, largest first."""
    return sorted(linears, key=lambda entry: entry["output_sqnr_db"] or float("inf"))


def hint(entry: dict[str, Any]) -> str:
    """What to try for a linear whose output is noisy; empty where it is not."""
    value = entry["output_sqnr_db"]
    if value is None or value >= _LOW_DB:
        return ""
    if entry["input"] is not None and entry["outliers"]["count"]:
        return "outlier channels: `smoothquant`, dynamic inputs, or `disabled` for its input"
    if entry["input"] is not None and entry["input"]["clip_rate"] > 0.01:
        return "inputs are clipped: calibrator max, or more calibration text"
    if entry["weight"] is not None and (entry["weight"]["sqnr_db"] or 99) < value + 3:
        return "the weight is the cause: smaller groups, AWQ or GPTQ, or a rule with more bits"
    return "a rule with more bits for this linear"


def check_plots() -> None:
    """Raises ValueError if matplotlib is not installed; meant to run before anything else."""
    if find_spec("matplotlib") is None:
        raise UserError("quality report: plots need matplotlib; pip install 'mqat[report]'.")


def _plots(linears: Sequence[dict[str, Any]]) -> str:
    """SQNR and clipping by depth as a PNG in base64."""
    from matplotlib.figure import Figure

    kinds: dict[str, list[tuple[int, dict[str, Any]]]] = {}
    for entry in linears:
        parts = entry["name"].split(".")
        layer = int(parts[2]) if len(parts) > 3 else 0
        kinds.setdefault(parts[-1], []).append((layer, entry))
    figure = Figure(figsize=(11, 7), layout="constrained")
    above, below = figure.subplots(2, 1)
    for kind, entries in kinds.items():
        layers = [layer for layer, _ in entries]
        above.plot(layers, [e["output_sqnr_db"] for _, e in entries], marker="o", label=kind)
        inputs = [100 * e["input"]["clip_rate"] if e["input"] else 0.0 for _, e in entries]
        below.plot(layers, inputs, marker="o", label=kind)
    above.set(ylabel="SQNR of the output, dB", title="Signal to quantization noise by layer")
    above.axhline(_LOW_DB, color="tab:red", linewidth=0.8, linestyle="--")
    above.legend()
    below.set(xlabel="layer", ylabel="clipped inputs, %")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return base64.b64encode(buffer.getvalue()).decode()


def _row(entry: dict[str, Any]) -> str:
    weight, found = entry["weight"], entry["outliers"]
    worst = ", ".join(f"{channel} ({ratio:g}x)" for channel, ratio in found["worst"])
    cells = (
        entry["name"],
        _db(entry["output_sqnr_db"]),
        "-" if weight is None else _db(weight["sqnr_db"]),
        _share(weight),
        _share(entry["input"]),
        _share(entry["output"]),
        f"{entry['input_amax']:.3g}",
        f"{found['count']}" + (f": {worst}" if worst else ""),
        hint(entry),
    )
    is_low = (entry["output_sqnr_db"] or _LOW_DB) < _LOW_DB
    columns = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
    return f"<tr{' class=low' if is_low else ''}>{columns}</tr>"


def _table(heads: Sequence[str], rows: Iterable[str]) -> str:
    return (
        f"<table><tr>{''.join(f'<th>{head}</th>' for head in heads)}</tr>{''.join(rows)}</table>\n"
    )


def _cache_rows(entry: dict[str, Any]) -> str:
    """A row for each scale of a layer's cache."""
    rows = []
    for kind in (kind for kind in ("kv", "key", "value") if kind in entry):
        cached = entry[kind]
        cells = (f"{entry['name']}.{kind}", _db(entry["output_sqnr_db"]), _db(cached["sqnr_db"]),
                 _share(cached), f"{cached['amax']:.3g}")  # fmt: skip
        rows.append(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>")
    return "".join(rows)


def _linears(linears: Sequence[dict[str, Any]]) -> str:
    """Summary, plots and table; empty without linears."""
    if not linears:
        return ""
    ordered = worst_first(linears)
    noisy = sum((e["output_sqnr_db"] or _LOW_DB) < _LOW_DB for e in ordered)
    first = ordered[0]
    summary = (
        f"{len(ordered)} quantized linears, {noisy} with less than {_LOW_DB:g} dB. Worst: "
        f"{first['name']} with {_db(first['output_sqnr_db'])} dB."
    )
    heads = ("linear", "output SQNR, dB", "weight SQNR, dB", "clipped weights", "clipped inputs",
             "clipped outputs", "input amax", "outlier channels", "try")  # fmt: skip
    return (
        f"<p>{escape(summary)}</p>"
        "<p class=hint>SQNR compares each linear with itself unquantized on the same input; 6 dB are "
        "one bit. Outlier channels: amax above 10 times the median channel's.</p>"
        f"<img alt='SQNR and clipping by layer' src='data:image/png;base64,{_plots(linears)}'>"
        f"{_table(heads, map(_row, ordered))}"
    )


def html_page(report: dict[str, Any], title: str) -> str:
    """The report for people, worst linears first; needs `check_plots`."""
    caches = ""
    if report["caches"]:
        heads = ("cache", "attention SQNR, dB", "SQNR, dB", "clipped", "amax")
        caches = "<h2>Key/value cache</h2>" + _table(heads, map(_cache_rows, report["caches"]))
    return (
        f"<!doctype html><meta charset=utf-8><title>{escape(title)}</title><style>{_STYLE}</style>"
        f"<h1>{escape(title)}</h1>{_linears(report['linears'])}{caches}"
    )


def write_report(report: dict[str, Any], directory: Path, title: str) -> None:
    """Writes `quality.json` and `quality.html`, each whole or not at all.

    Args:
        report: From `evaluation.quality.quality_report`.
        directory: Created if missing.
        title: Of the page.

    Raises:
        ValueError: matplotlib is not installed; nothing is written then.
    """
    check_plots()
    files = {
        "quality.json": json.dumps(report, indent=1) + "\n",
        "quality.html": html_page(report, title),
    }
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        temporary = directory / f"{name}.tmp"
        temporary.write_text(text, "utf-8")
        os.replace(temporary, directory / name)

"""The quality report as files: `quality.json`, and one HTML page that needs nothing beside it."""

import base64
import io
import json
import math
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader

from mqat.errors import UserError
from mqat.files import write_whole

_LOW_DB = 20.0  # below this, a tenth of the output's amplitude is noise


def worst_first(linears: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """By the noise in the output, largest first."""
    return sorted(linears, key=lambda entry: _decibel(entry["output_sqnr_db"]))


def _decibel(value: float | None) -> float:
    return math.inf if value is None else value  # None: exact


def hint(entry: dict[str, Any]) -> str:
    """What to try for a linear whose output is noisy; empty where it is not."""
    value = entry["output_sqnr_db"]
    if value is None or value >= _LOW_DB:
        return ""
    if entry["input"] is not None and entry["outliers"]["count"]:
        return "outlier channels: `smoothquant`, dynamic inputs, or `disabled` for its input"
    if entry["input"] is not None and entry["input"]["clip_rate"] > 0.01:
        return "inputs are clipped: calibrator max, or more calibration text"
    if entry["weight"] is not None and _decibel(entry["weight"]["sqnr_db"]) < value + 3:
        return "the weight is the cause: smaller groups, AWQ or GPTQ, or a rule with more bits"
    return "a rule with more bits for this linear"


def check_plots() -> None:
    """Raises UserError if matplotlib is not installed; meant to run before anything else."""
    if find_spec("matplotlib") is None:
        raise UserError("quality report: plots need matplotlib; pip install 'mqat[report]'.")


def _plots(linears: Sequence[dict[str, Any]]) -> str:
    """SQNR and clipping by depth as a PNG in base64."""
    from matplotlib.figure import Figure

    kinds: dict[str, list[tuple[int, dict[str, Any]]]] = {}
    for entry in sorted(linears, key=lambda entry: entry["layer"] or 0):
        module = entry["module"]
        if "is_idle" in entry:  # an expert, the worst of its layer
            module = f"worst expert, {module.rpartition('.')[2]}"
        kinds.setdefault(module, []).append((entry["layer"] or 0, entry))
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


def shown(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The linears of a report, and of each layer's experts the worst, worst first."""
    worst = {mixture["worst"] for mixture in report["mixtures"]}
    return worst_first([e for e in report["linears"] if "is_idle" not in e or e["name"] in worst])


def html_page(report: dict[str, Any], title: str) -> str:
    """The report for people, worst linears first; needs `check_plots`."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["hint"] = hint
    linears = shown(report)
    return environment.get_template("page.html.jinja").render(
        title=title,
        linears=linears,
        mixtures=report["mixtures"],
        caches=report["caches"],
        plots=_plots(linears) if linears else "",
        low_db=_LOW_DB,
    )


def write_report(report: dict[str, Any], directory: Path, title: str) -> None:
    """Writes `quality.json` and `quality.html` of `evaluation.quality`, each whole or not at all.

    Raises:
        UserError: matplotlib is not installed; nothing is written then.
    """
    check_plots()
    files = {
        "quality.json": json.dumps(report, indent=1) + "\n",
        "quality.html": html_page(report, title),
    }
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        write_whole(directory / name, text)

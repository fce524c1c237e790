"""The quality report as files: JSON, and one HTML page that needs nothing beside it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader

from mqat.errors import UserError
from mqat.files import write_whole
from mqat.report.advice import LOW_DB, decibel, hint
from mqat.report.plots import check_plots, sqnr_by_layer


def worst_first(linears: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """By the noise in the output, largest first."""
    return sorted(linears, key=lambda entry: decibel(entry["output_sqnr_db"]))


def shown(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The linears of a report, and of each layer's experts the worst, worst first."""
    worst = {mixture["worst"] for mixture in report["mixtures"]}
    return worst_first([e for e in report["linears"] if "is_idle" not in e or e["name"] in worst])


def templates() -> Environment:
    """The pages' environment: everything that is put into one is escaped."""
    return Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def html_page(
    report: Mapping[str, Any], title: str, *, before: Mapping[str, Any] | None = None
) -> str:
    """The report for people, worst linears first; needs `check_plots`.

    Args:
        report: Of `evaluation.quality`, with `about` (see `advice.hint`) where it is known.
        title: Of the page.
        before: Of the same model at an earlier time, such as before QAT: shown beside.
    """
    linears = shown(report)
    about = report.get("about", {})
    earlier = {} if before is None else {entry["name"]: entry for entry in before["linears"]}
    return (
        templates()
        .get_template("quality.html.jinja")
        .render(
            title=title,
            about=about,
            about_before={} if before is None else before.get("about", {}),
            hints={entry["name"]: hint(entry, about) for entry in linears},
            linears=linears,
            earlier=earlier,
            mixtures=report["mixtures"],
            caches=report["caches"],
            plots=sqnr_by_layer(linears) if linears else "",
            low_db=LOW_DB,
        )
    )


def write_report(
    report: Mapping[str, Any],
    directory: Path,
    title: str,
    *,
    before: Mapping[str, Any] | None = None,
    name: str = "quality",
) -> None:
    """Writes `<name>.json` and `quality.html` of `evaluation.quality`, each whole or not at all.

    Raises:
        UserError: matplotlib is not installed; nothing is written then.
    """
    check_plots()
    files = {
        f"{name}.json": json.dumps(report, indent=1) + "\n",
        "quality.html": html_page(report, title, before=before),
    }
    directory.mkdir(parents=True, exist_ok=True)
    for file, text in files.items():
        write_whole(directory / file, text)


def write_run_quality(report: Mapping[str, Any], directory: Path, *, is_trained: bool) -> None:
    """Writes the report of a run's calibrated model, or of the trained one beside the calibrated.

    Args:
        report: Of `evaluation.quality`, with `about`.
        directory: Gets `quality.json` and `quality.html`; after training `quality_qat.json` and the
            page with both.
        is_trained: Whether QAT has ended.

    Raises:
        UserError: As `write_report`; or the calibrated model's file is damaged.
    """
    title = f"{report.get('about', {}).get('algorithm', 'quantized')}: quality by linear"
    if not is_trained:
        write_report(report, directory, title)
        return
    calibrated = directory / "quality.json"  # a run that began without a report has none
    before = read_report(calibrated) if calibrated.is_file() else None
    write_report(report, directory, title, before=before, name="quality_qat")


def read_report(file: Path) -> dict[str, Any]:
    """A report that was written before.

    Raises:
        UserError: There is none, or it is damaged.
    """
    try:
        report = json.loads(file.read_text("utf-8"))
        names = [entry["name"] for entry in report["linears"]]
    except OSError as error:
        raise UserError(f"{file}: {error.strerror or error}.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: not a quality report ({error!r}).") from error
    assert len(names) == len(set(names)), f"{file}: a linear twice"
    return dict(report)

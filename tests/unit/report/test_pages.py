"""Pages of a run and of a quality report, from files as runs leave them."""

import json
import re

import pytest

from mqat.cli.__main__ import main
from mqat.report.page import html_page, read_report, write_run_quality
from mqat.report.run_page import perplexity_rows, run_page
from tests.unit.report.entries import entry


def quality(sqnr, **about):
    linears = [entry("decoder.layers.0.mlp.linear_fc2", sqnr)]
    return {"version": 1, "linears": linears, "mixtures": [], "caches": [], "about": about}


def test_the_page_says_what_was_measured_and_compares_with_before():
    before = quality(9.0, stage="after calibration", tokens=3072)
    after = quality(21.5, stage="after QAT", algorithm="int4", tokens=3072, text="<wiki>")
    page = html_page(after, "int4", before=before)
    assert "after QAT <span class=note>(before: after calibration)</span>" in page
    assert "<td>3,072</td>" in page and "&lt;wiki&gt;" in page
    cells = re.findall(r'<td data-value="([^"]+)">([^<]+)</td>', page)
    assert cells[:3] == [("21.5", "21.5"), ("9.0", "9.0"), ("12.5", "+12.5")]
    assert "gained" not in html_page(after, "int4")


def test_a_run_leaves_both_reports_and_one_page(tmp_path):
    write_run_quality(quality(9.0, algorithm="int4"), tmp_path, is_trained=False)
    assert "gained" not in (tmp_path / "quality.html").read_text("utf-8")
    write_run_quality(quality(15.0, algorithm="int4"), tmp_path, is_trained=True)
    assert "+6.0" in (tmp_path / "quality.html").read_text("utf-8")
    assert read_report(tmp_path / "quality.json")["linears"][0]["output_sqnr_db"] == 9.0
    (tmp_path / "quality.json").write_text("{}")
    with pytest.raises(ValueError, match=r"quality\.json: not a quality report"):
        write_run_quality(quality(15.0), tmp_path, is_trained=True)


SUMMARY = {
    "finished": True, "done": ["bf16", "baseline", "ptq", "qat"], "seconds": 61.2, "gap_recovered": 0.8,
    "loss": {"bf16": 3.0, "bf16_finetuned": 2.9, "ptq": 3.5, "qat": 3.0},
    "ppl": {"bf16": 20.0, "bf16_finetuned": 18.0, "ptq": 33.0, "qat": 20.7},
    "samples": {"The <def>": {"bf16": "statement", "qat": "& more"}},
    "about": {"model": "llama", "layout": "TP 2 x PP 2 x CP 1 x DP 2", "key/value cache": None},
    "export": {"path": "runs/x/trtllm", "verified": True, "problems": [], "lines": ["read: 4 files"]},
}  # fmt: skip


@pytest.fixture
def run(tmp_path):
    """A finished run's directory."""
    (tmp_path / "config.yaml").write_text("trainer:\n  max_steps: 3\n")
    (tmp_path / "summary.json").write_text(json.dumps(SUMMARY))
    lines = [
        {"phase": phase, "step": step, "loss": 4.0 - step / 10, "lr": 1e-4, "grad_norm": 1.0,
         "tokens_per_second": 100.0, "peak_memory_bytes": 2**30}
        for phase in ("pretrain", "baseline", "qat") for step in (1, 2, 3)
    ]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    return tmp_path


def test_a_run_is_one_page_with_curves_figures_samples_and_verdict(run, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["mqat", "report", str(run)])
    main()
    assert capsys.readouterr().out == f"{run / 'report.html'}\n"
    page = (run / "report.html").read_text("utf-8")
    assert page.count("<svg") == 3 and "src=" not in page and "http-equiv" not in page
    for text in (
        "PTQ changes perplexity by +65.0%; QAT recovers 80.0%", "<strong class=good>verified</strong>",
        "TP 2 x PP 2 x CP 1 x DP 2", "The &lt;def&gt;", "&amp; more", "read: 4 files",
        "QAT, held-out 3.000", "max_steps: 3",
    ):  # fmt: skip
        assert text in page, text
    assert "key/value cache" not in page and "quality.html" not in page


def test_qat_is_compared_with_the_model_that_was_trained_alike():
    changes = {row["name"]: row["change"] for row in perplexity_rows(SUMMARY["ppl"])}
    assert changes["QAT"] == pytest.approx(20.7 / 18 - 1)
    assert changes["PTQ"] == pytest.approx(33 / 20 - 1) and changes["unquantized"] is None


def test_a_run_that_failed_or_is_not_finished_says_so(run):
    failed = SUMMARY["export"] | {"verified": False, "problems": ["rank0: x is missing"]}
    (run / "summary.json").write_text(json.dumps(SUMMARY | {"export": failed}))
    assert "failed, 1 problem" in run_page(run) and "x is missing" in run_page(run)
    (run / "summary.json").write_text(json.dumps({"finished": False, "done": ["bf16"]}))
    (run / "metrics.jsonl").write_text('{"phase": "ba')
    page = run_page(run)
    assert "has not come to its end; finished so far: bf16" in page and "<svg" not in page


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("summary.json", "{", r"summary\.json: damaged"),
        ("metrics.jsonl", '{"phase": "qat"}\n', r"metrics\.jsonl:1: damaged"),
        ("config.yaml", None, r"not the directory of a run \(config\.yaml is missing\)"),
    ],
)
def test_damaged_files_are_named(run, file, content, message):
    (run / file).unlink() if content is None else (run / file).write_text(content)
    with pytest.raises(ValueError, match=message):
        run_page(run)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [("{run} --text x", "--text and --before are for one of its checkpoints"),
     ("{run}/other", "give --text FILE and --out DIR"),
     ("{run}/other --text x", "give --text FILE and --out DIR")],
)  # fmt: skip
def test_arguments_of_the_other_kind_of_report_are_refused(
    run, arguments, message, monkeypatch, capsys
):
    monkeypatch.setattr("sys.argv", ["mqat", "report", *arguments.format(run=run).split()])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2 and message in capsys.readouterr().err

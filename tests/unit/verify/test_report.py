"""What verification says: what was compared, what was not, and with which checkpoint."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from mqat.verify import verify
from mqat.verify.report import Report


def found(**changes):
    values = {
        "num_files": 2, "form": "TensorRT-LLM for TP 2 x PP 1", "num_tensors": 90, "num_linears": 8,
        "linears": {"FP8": 7, "unquantized": 1},
    }  # fmt: skip
    return Report(**(values | changes))


COMPARED = {"checkpoint": "runs/c", "compared_with_checkpoint": True}
LOGITS = {
    "positions": 128, "mean_kl": 2e-9, "top1_agreement": 1.0, "noise": 1e-5, "noise_kl": 3e-9,
    "noise_top1_agreement": 0.99, "worst_linear": 3e-7, "worst_layer": 2e-4,
}  # fmt: skip


def test_everything_that_was_compared_is_said():
    report = found(**COMPARED, **LOGITS, recorded="logits that training recorded: KL 0")
    said = "\n".join(report.lines())
    for part in (
        "read: TensorRT-LLM for TP 2 x PP 1, 90 tensors in 2 files; 8 linears (7 FP8, 1 unquantized)",
        "made from runs/c.", "linears within 3.0e-07", "logits: of 128 positions",
        "training: logits that training recorded",
        "not compared: tokenizer files, which are copied; a server and what it builds",
    ):  # fmt: skip
        assert part in said
    assert report.headline() == (
        "verified, 2 files of weights, every tensor equal to the checkpoint runs/c, logits within "
        "rounding (KL 2.0e-09)"
    )


@pytest.mark.parametrize(
    ("given", "missing"),
    [
        (
            {},
            [
                "tensors with the checkpoint they were made from",
                "linears and layers",
                "logits with",
            ],
        ),
        (
            COMPARED,
            ["linears and layers with the training model", "logits with the training model"],
        ),
        ({"problems": ["x is missing"]}, ["tensors with a checkpoint", "logits with"]),
    ],
)
def test_what_was_not_compared_is_said(given, missing):
    *_, last = found(**given).lines()
    assert last.startswith("not compared: ")
    assert [part in last for part in missing] == [True] * len(missing)
    assert "made from runs/c" not in last


def test_a_failure_claims_no_comparison():
    report = found(**COMPARED, **LOGITS, problems=["a", "b"])
    assert report.headline() == "FAILED, 2 problems, first: a"
    assert not any("made from" in line or line.startswith("logits") for line in report.lines())
    assert report.to_dict()["lines"] == report.lines()


@pytest.mark.parametrize(("differing", "is_another"), [(4, False), (5, True)])
def test_another_checkpoint_is_told_from_a_damaged_tensor(differing, is_another, monkeypatch):
    """From one difference a layer on."""
    names = [f"layer {n}: is not the checkpoint's" for n in range(differing)]
    monkeypatch.setattr(verify, "compare_with_checkpoint", lambda *_: iter(names))
    monkeypatch.setattr(verify, "CheckpointReader", lambda path: path)
    export = SimpleNamespace(model=SimpleNamespace(value=lambda _: 4))
    problems = verify._compared(export, Path("runs/c"))
    assert ("not those of runs/c: the export was made from another" in problems[0]) == is_another
    assert problems[is_another:] == names

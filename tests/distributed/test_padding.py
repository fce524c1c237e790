"""Padded conversations give the same scales and quality figures on every parallel layout."""

import json
from pathlib import Path

import pytest

from tests.distributed.padding_worker import CASES
from tests.distributed.ranks import run_ranks
from tests.distributed.test_recipes import differences, tensors

WORKER = Path(__file__).with_name("padding_worker.py")
LAYOUTS = {
    1: {"tp1": {}, "tp1-ignored": {"ignored": True}},
    2: {"tp2": {"tp": 2}, "tp2-sp": {"tp": 2, "sp": True}, "pp2": {"pp": 2}, "dp2": {}},
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    root = tmp_path_factory.mktemp("padding")
    for processes, layouts in LAYOUTS.items():
        file = root / f"{processes}.json"
        file.write_text(json.dumps(layouts))
        done = run_ranks(processes, WORKER, root, file, timeout=300)
        assert done.returncode == 0, done.stderr[-4000:]
    return root


def figures(root: Path, layout: str, case: str) -> dict[str, list]:
    """Of each linear and cache: decibels, then what is merged by MAX or counted."""
    report = json.loads((root / layout / f"{case}.json").read_text())
    found = {}
    for entry in report["linears"] + report["caches"]:
        operands = [x for x in entry.values() if isinstance(x, dict) and "clip_rate" in x]
        found[entry["name"]] = [
            [entry["output_sqnr_db"], *(x["sqnr_db"] for x in operands)],
            [[x["clip_rate"], x["amax"]] for x in operands],
        ]
    return found


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("layout", LAYOUTS[2])
def test_scales_of_padded_conversations_are_bit_equal_on_every_layout(results, layout, case):
    assert not differences(tensors(results, "tp1", case), tensors(results, layout, case))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("layout", LAYOUTS[2])
def test_quality_of_padded_conversations_is_the_same_on_every_layout(results, layout, case):
    expected, found = figures(results, "tp1", case), figures(results, layout, case)
    ignored = figures(results, "tp1-ignored", case)
    assert list(found) == list(expected)
    far = 0
    for name, (decibels, counts) in expected.items():
        # The GEMMs of quantized models round differently at other TP sizes, which moves single codes.
        assert found[name][0] == pytest.approx(decibels, abs=0.05)
        for pair, other in zip(counts, found[name][1], strict=True):
            assert other == pytest.approx(pair, rel=1e-2, abs=1e-4)
        far += ignored[name][0] != pytest.approx(decibels, abs=0.05)
    assert far > len(expected) / 2  # control: padding would be seen


@pytest.mark.parametrize("case", CASES)
def test_counting_padding_gives_other_scales(results, case):
    """Control: the comparison above can fail."""
    found = differences(tensors(results, "tp1", case), tensors(results, "tp1-ignored", case))
    assert any(key.endswith("_scale") for key in found)

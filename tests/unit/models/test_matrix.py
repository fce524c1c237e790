"""Every row of the matrix of docs/families.md, run again."""

import json
from pathlib import Path

import pytest

from mqat.models.decoder import FAMILIES
from tests.unit.models.matrix import GRADIENTS, LOGITS, measure

MEASURED = Path(__file__).parents[3] / "docs" / "families.json"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_does_what_the_page_says(family, world, tmp_path):
    expected = json.loads(MEASURED.read_text("utf-8"))
    assert family in expected, "python tools/list_families.py --measure > docs/families.md"
    found = measure(family, tmp_path)
    print(f"{family}: {found}")
    assert found["logits"] <= LOGITS and found["gradients"] <= GRADIENTS
    before, after = found["loss"]
    assert after < 0.5 * before
    assert found["loss"] == pytest.approx(expected[family]["loss"], rel=0.1, abs=0.02)
    outcomes = {form: found[form] for form in ("trtllm", "hf")}
    assert outcomes == {form: expected[family][form] for form in outcomes}

"""The page of families is what the families say."""

import importlib.util
import json
from pathlib import Path

from mqat.models.decoder import FAMILIES

ROOT = Path(__file__).parents[3]


def test_the_page_of_families_is_current():
    spec = importlib.util.spec_from_file_location(
        "list_families", ROOT / "tools" / "list_families.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    page = (ROOT / "docs" / "families.md").read_text("utf-8")
    measured = json.loads(module.MEASURED.read_text("utf-8"))
    assert page == module.page(measured), "python tools/list_families.py > docs/families.md"
    assert set(measured) == set(FAMILIES), (
        "python tools/list_families.py --measure > docs/families.md"
    )

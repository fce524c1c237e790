"""The page of families is what the families say."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).parents[3]


def test_the_page_of_families_is_current():
    spec = importlib.util.spec_from_file_location(
        "list_families", ROOT / "tools" / "list_families.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    page = (ROOT / "docs" / "families.md").read_text("utf-8")
    assert page == module.table(), "python tools/list_families.py > docs/families.md"

"""Imports point one way; this reads them with `ast`, so nothing has to be imported."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "mqat"
_BOTTOM = {"errors", "files", "transfer"}
_MODEL = _BOTTOM | {"quant", "models"}
_PARALLEL = _MODEL | {"kernels", "parallel", "runtime", "config"}
_CHECKPOINTS = _PARALLEL | {"specs", "data"}
ALLOWED = {
    "quant": _BOTTOM,
    "models": _BOTTOM | {"quant"},
    "runtime": _BOTTOM,
    "report": _BOTTOM,
    "kernels": _BOTTOM | {"quant"},
    "parallel": _MODEL | {"kernels"},
    "specs": _MODEL | {"kernels", "parallel", "config", "runtime.megatron_releases"},
    "data": _BOTTOM | {"config", "models"},
    "calibration": _MODEL | {"kernels", "parallel", "runtime"},
    "checkpoints": _CHECKPOINTS,
    "export": _MODEL | {"checkpoints.manifest", "checkpoints.reader", "data.gguf_words"},
    "verify": _BOTTOM | {"quant.scheme", "checkpoints.archive", "checkpoints.reader"},
    "plan": _CHECKPOINTS | {"calibration.check_recipes", "checkpoints", "export", "report"},
    "evaluation": _CHECKPOINTS | {"checkpoints", "calibration", "verify", "report"},
    "training": _CHECKPOINTS
    | {"calibration", "checkpoints", "export", "verify", "evaluation", "plan", "report",
       "experiment_config"},
}  # fmt: skip


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def violations(layer: str, names: set[str]) -> list[str]:
    wrong = []
    for name in names:
        inside = name.removeprefix("mqat.")
        if not name.startswith("mqat.") or inside.split(".")[0] == layer:
            continue
        if not any(inside == ok or inside.startswith(ok + ".") for ok in ALLOWED[layer]):
            wrong.append(name)
    return wrong


@pytest.mark.parametrize("layer", ALLOWED)
def test_layer_imports_only_what_is_left_of_it(layer):
    wrong = {str(p): violations(layer, imports(p)) for p in sorted((ROOT / layer).rglob("*.py"))}
    assert not {path: names for path, names in wrong.items() if names}


def test_verify_takes_no_arithmetic_and_no_table_from_what_it_checks():
    """A second opinion: scheme data classes and the checkpoint's reader are all it shares."""
    taken = set().union(*(imports(path) for path in (ROOT / "verify").rglob("*.py")))
    shared = {name for name in taken if name.startswith("mqat.") and "verify" not in name}
    assert shared == {
        "mqat.errors", "mqat.quant.scheme", "mqat.checkpoints.archive", "mqat.checkpoints.reader",
    }  # fmt: skip
    for name in (
        "quant.functional",
        "quant.scales",
        "quant.packing",
        "kernels",
        "export",
        "models.structure",
    ):
        assert violations("verify", {f"mqat.{name}"})


def test_the_rule_can_fail():
    assert violations("quant", {"mqat.parallel.linear"}) == ["mqat.parallel.linear"]


def test_quant_and_export_and_verify_do_not_import_megatron():
    for layer in ("quant", "models", "export", "verify", "data"):
        for path in (ROOT / layer).rglob("*.py"):
            assert not any(name.startswith("megatron") for name in imports(path)), path

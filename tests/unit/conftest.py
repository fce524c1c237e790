from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from mqat.kernels.cpu import passes
from tests.unit.export.checkpoints import TINY, all_layers, write_checkpoint
from tests.unit.model_fixtures import calibrated as calibrated
from tests.unit.model_fixtures import world as world


@pytest.fixture(params=["cpu", "reference"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Operators on the CPU by the compiled library, and as where there is no C++ compiler."""
    if request.param == "reference":
        monkeypatch.setattr(passes, "library", lambda: None)
    elif passes.library() is None:
        pytest.skip("no C++ compiler here")
    return request.param


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`tiny("int8")`: the tiny model's checkpoint of an algorithm; shared, so never changed."""
    made: dict[str, Path] = {}

    def checkpoint(algorithm: str) -> Path:
        if algorithm not in made:
            path = tmp_path_factory.mktemp(algorithm) / "checkpoint"
            made[algorithm] = write_checkpoint(path, TINY, all_layers(algorithm))
        return made[algorithm]

    return checkpoint

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from mqat.export.export import export_trtllm


@pytest.fixture(scope="session")
def exported(
    tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """`exported("int8", tp=2, pp=2)`: directory of the tiny model; shared, so never changed."""
    made: dict[tuple[object, ...], Path] = {}

    def directory(algorithm: str, tp: int = 1, pp: int = 1, dtype: str = "bfloat16") -> Path:
        key = (algorithm, tp, pp, dtype)
        if key not in made:
            out = tmp_path_factory.mktemp("exported") / "out"
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                export_trtllm(
                    tiny(algorithm), out, tensor_parallel=tp, pipeline_parallel=pp, dtype=dtype,
                    allow_requantization=True,
                )  # fmt: skip
            made[key] = out
        return made[key]

    return directory


@pytest.fixture
def broken(exported: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """Like `exported`, but a copy that the test may change."""

    def directory(*args: object, **kwargs: object) -> Path:
        return Path(shutil.copytree(exported(*args, **kwargs), tmp_path / "copy"))

    return directory

"""The range of Megatron-Core releases, and layer specs in the forms that these have."""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mqat.errors import UserError
from mqat.runtime import megatron_releases
from mqat.runtime.megatron_releases import check_release, submodules_of, with_submodules


@pytest.mark.parametrize("installed", ["0.16.1", "0.17.0", "0.19.2", "0.19.0rc3"])
def test_supported_releases_pass(monkeypatch, installed):
    monkeypatch.setattr(megatron_releases, "version", lambda name: installed)
    check_release()


@pytest.mark.parametrize("installed", ["0.15.3", "0.16.0", "0.20.0", "0.20.0rc1", "1.0"])
def test_others_are_refused_with_the_range(monkeypatch, installed):
    monkeypatch.setattr(megatron_releases, "version", lambda name: installed)
    with pytest.raises(UserError, match=rf"{installed} is installed.*>=0\.16\.1,<0\.20"):
        check_release()


def test_a_missing_package_is_named(monkeypatch):
    def missing(name):
        raise megatron_releases.PackageNotFoundError(name)

    monkeypatch.setattr(megatron_releases, "version", missing)
    with pytest.raises(UserError, match="not installed"):
        check_release()


def test_the_package_asks_for_the_same_range():
    pyproject = (Path(__file__).parents[3] / "pyproject.toml").read_text("utf-8")
    assert '"megatron-core>=0.16.1,<0.20"' in pyproject


@dataclass
class Spec:
    submodules: Any


def build(submodules, size):
    return submodules, size


def test_specs_and_builders_are_read_and_copied():
    for spec in (Spec("a"), functools.partial(build, submodules="a", size=3)):
        copy = with_submodules(spec, "b")
        assert (submodules_of(spec), submodules_of(copy)) == ("a", "b")
    assert copy() == ("b", 3)
    assert submodules_of(build) is None

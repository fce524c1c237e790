"""Pickles of others run no code, change no class of this process, and inflate to nothing."""

import argparse
import io
import pathlib
import zipfile

import pytest
import torch
from torch.distributed.checkpoint import metadata

from mqat.checkpoints import records, torch_dist
from mqat.checkpoints.records import MappedFile


def sets_attribute(module: str, name: str) -> bytes:
    """A pickle that names a class or function, and sets an attribute of it."""
    return f"c{module}\n{name}\n(N}}Vwas_set\nI1\nstb.".encode()


def load(unpickler):
    """Whatever comes of it; some refuse."""
    try:
        unpickler.load()
    except (TypeError, AttributeError, ValueError):
        pass


@pytest.mark.parametrize(("module", "name", "real"), [
    ("pathlib", "PosixPath", pathlib.PosixPath),
    ("torch.distributed.checkpoint.metadata", "Metadata", metadata.Metadata),
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING", metadata._MEM_FORMAT_ENCODING),
    ("torch.serialization", "_get_layout", torch.serialization._get_layout),
    ("builtins", "getattr", torch_dist._enum_member),
    ("torch", "Size", torch.Size),
])  # fmt: skip
def test_an_index_sets_no_attribute_of_what_it_names(module, name, real):
    load(torch_dist._IndexUnpickler(io.BytesIO(sets_attribute(module, name))))
    assert not hasattr(real, "was_set")


@pytest.mark.parametrize("where", [*records._WORDS, *records._CLASSES, *records._FUNCTIONS])
def test_a_record_sets_no_attribute_of_what_it_names(where):
    load(records._PlainUnpickler(io.BytesIO(sets_attribute(*where)), None))
    for table in (records._WORDS, records._CLASSES, records._FUNCTIONS):
        assert not hasattr(table.get(where), "was_set")


def test_a_record_still_gives_namespaces(tmp_path):
    torch.save({"args": argparse.Namespace(x=1)}, tmp_path / "a.pt")
    found = MappedFile(tmp_path / "a.pt").load(0, (tmp_path / "a.pt").stat().st_size)["args"]
    assert isinstance(found, argparse.Namespace) and vars(found) == {"x": 1}


def test_a_compressed_or_huge_record_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "a.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", bytes(1 << 20))
    with pytest.raises(ValueError, match=r"data.pkl is compressed"):
        MappedFile(path).load(0, path.stat().st_size)
    torch.save({"x": 1}, path)
    assert MappedFile(path).load(0, path.stat().st_size) == {"x": 1}  # control
    monkeypatch.setattr(records, "_PICKLE_BYTES", 4)
    with pytest.raises(ValueError, match=r"data.pkl is larger than 4 bytes"):
        MappedFile(path).load(0, path.stat().st_size)

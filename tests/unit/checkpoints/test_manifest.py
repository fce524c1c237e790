"""Checksums: which files are read, while something else reads them, and what a failure then says."""

import json
import time

import pytest

from mqat.checkpoints import manifest
from mqat.checkpoints.manifest import (
    DESCRIPTION,
    FORMAT_VERSION,
    check_files,
    checking_data,
    describe_files,
    read_description,
)

DATA, INDEX = "__0_0.distcp", ".metadata"


@pytest.fixture
def checkpoint(tmp_path):
    for name in (DATA, INDEX):
        (tmp_path / name).write_bytes(name.encode() * 100)
    files = describe_files(tmp_path, [DATA, INDEX])
    description = {"format_version": FORMAT_VERSION, "files": files}
    (tmp_path / DESCRIPTION).write_text(json.dumps(description))
    return tmp_path


def flip(file):
    data = bytearray(file.read_bytes())
    data[7] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("crc", "damaged", "is_found"),
    [
        ("all", DATA, True), ("all", INDEX, True), ("data", DATA, True), ("data", INDEX, False),
        ("index", DATA, False), ("index", INDEX, True), ("none", DATA, False),
    ],
)  # fmt: skip
def test_which_files_are_read(crc, damaged, is_found, checkpoint):
    description = read_description(checkpoint)
    check_files(checkpoint, description, crc=crc)
    flip(checkpoint / damaged)
    if not is_found:
        check_files(checkpoint, description, crc=crc)
        return
    with pytest.raises(ValueError, match=rf"{damaged}: contents do not match the checksum"):
        check_files(checkpoint, description, crc=crc)


@pytest.mark.parametrize("files", [{DATA: {"bytes": 1200}}, {DATA: None}, [DATA]])
def test_a_damaged_description_is_named(files, checkpoint):
    with pytest.raises(ValueError, match=r"mqat\.json: damaged"):
        check_files(checkpoint, {"files": files}, crc="none")


def test_a_checkpoint_that_does_not_exist(tmp_path):
    with pytest.raises(ValueError, match="nowhere: no such file or directory"):
        read_description(tmp_path / "nowhere")


def test_the_body_runs_and_damage_is_raised_after_it_or_instead_of_its_failure(checkpoint):
    description, done = read_description(checkpoint), []
    with checking_data(checkpoint, description):
        done.append(1)
    with pytest.raises(ZeroDivisionError), checking_data(checkpoint, description):
        raise ZeroDivisionError
    flip(checkpoint / DATA)
    with pytest.raises(ValueError, match="do not match"), checking_data(checkpoint, description):
        done.append(2)
    with pytest.raises(ValueError, match="do not match"), checking_data(checkpoint, description):
        raise ZeroDivisionError
    assert done == [1, 2]


def test_an_interrupt_does_not_wait_for_the_rest_of_the_files(checkpoint, monkeypatch):
    class Slow:
        """An endless file."""

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def read(self, _):
            time.sleep(0.01)
            return b"more"

    monkeypatch.setattr(manifest.Path, "open", lambda *_: Slow())
    with pytest.raises(KeyboardInterrupt), checking_data(checkpoint, _sizes(checkpoint)):
        raise KeyboardInterrupt


def _sizes(checkpoint):
    return {"files": {DATA: {"bytes": (checkpoint / DATA).stat().st_size, "crc32": "0"}}}

"""A `.nemo` is compared with its checkpoint: any one tensor or word that differs is found."""

import json
import re
import shutil
import sys
import tarfile

import pytest
import torch
import yaml

from mqat.cli.__main__ import main
from mqat.data.tokenizer import save_tokenizer, train_small_tokenizer
from mqat.evaluation.nemo_archive import verify_nemo
from mqat.export.export import export_checkpoint
from mqat.export.exporter import ExportOptions
from mqat.export.exporters import exporter
from tests.unit.export.checkpoints import BIASED, TINY, all_layers, describe, write_checkpoint

TIED = "share_embeddings_and_output_weights"


@pytest.fixture
def made(tmp_path):
    """A checkpoint and its archive in bfloat16."""

    def make(model=TINY, algorithm="null"):
        path = tmp_path / "checkpoint"
        write_checkpoint(path, model, all_layers(algorithm, model))
        shutil.rmtree(path / "tokenizer", ignore_errors=True)
        save_tokenizer(train_small_tokenizer(["to be or not to be"], 300), path / "tokenizer")
        describe(path)
        out = tmp_path / "model.nemo"
        export_checkpoint(exporter("nemo"), path, out, ExportOptions())
        return path, out

    return make


def rewritten(archive, change):
    """The archive with the files that `change` alters in their directory."""
    directory = archive.parent / "unpacked"
    with tarfile.open(archive) as stored:
        stored.extractall(directory)
    change(directory)
    out = archive.with_name("changed.nemo")
    with tarfile.open(out, "w") as stored:
        stored.add(directory, ".")
    shutil.rmtree(directory)
    return out


@pytest.mark.parametrize("model", [TINY, BIASED], ids=["tied", "biased"])
def test_what_was_exported_is_verified(made, model):
    checkpoint, archive = made(model)
    report = verify_nemo(archive, checkpoint)
    assert report.ok and report.num_files == model.num_layers + 1
    assert f"every tensor equal to the checkpoint {checkpoint}" in report.headline()
    assert not any("config.json" in line for line in report.lines())
    alone = verify_nemo(archive)
    assert alone.ok and not alone.compared_with_checkpoint


def flip(name, at):
    def change(directory):
        """The lowest bit of one element; the record's own checksum is that of torch's archive."""
        file = directory / "model_weights" / name
        content = bytearray(file.read_bytes())
        content[at] ^= 1
        file.write_bytes(content)

    return change


def reword(key, value):
    def change(directory):
        file = directory / "model_config.yaml"
        said = yaml.safe_load(file.read_text())
        assert said[key] != value
        file.write_text(yaml.safe_dump(said | {key: value}))

    return change


def poison(directory):
    file = directory / "model_weights" / "__2_0.distcp"
    content = bytearray(file.read_bytes())
    at = content.index(torch.tensor([1.0]).bfloat16().view(torch.uint8).numpy().tobytes(), 700)
    content[at : at + 2] = b"\x80\x7f"  # infinity
    file.write_bytes(content)


def test_every_change_is_found(made):
    checkpoint, archive = made()
    middle = len(tarfile.open(archive).extractfile("./model_weights/__3_0.distcp").read()) // 2
    changes = {
        "tensor model.decoder.layers.*of layer 2 is not the checkpoint's": flip("__3_0.distcp", middle),
        "rope_theta=500000.0, but the checkpoint has": reword("rotary_base", 5e5),
        "share_embeddings.*=False, but its tensors say otherwise": reword(TIED, False),
        "tokenizer is not": lambda d: save_tokenizer(train_small_tokenizer(["abcabc"], 280), d),
        "__1_0.distcp is missing": lambda d: (d / "model_weights" / "__1_0.distcp").unlink(),
        "NaN or inf": poison,
    }  # fmt: skip
    for message, change in changes.items():
        report = verify_nemo(rewritten(archive, change), checkpoint)
        assert len(report.problems) == 1 and re.search(message, report.problems[0]), message


def test_the_command_says_what_it_found(made, monkeypatch, capsys):
    checkpoint, archive = made(algorithm="int4")
    monkeypatch.setattr(
        sys, "argv", f"mqat verify {archive} --reference {checkpoint} --json".split()
    )
    with pytest.raises(SystemExit) as ended:
        main()
    found = json.loads(capsys.readouterr().out)
    assert (ended.value.code, found["ok"], found["compared_with_checkpoint"]) == (0, True, True)
    monkeypatch.setattr(sys, "argv", f"mqat verify {archive} --text a.txt".split())
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "are compared, not run; leave out --text" in capsys.readouterr().err
    archive.write_bytes(archive.read_bytes()[: archive.stat().st_size // 2])
    monkeypatch.setattr(sys, "argv", f"mqat verify {archive}".split())
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1 and "not a complete tar archive" in capsys.readouterr().out

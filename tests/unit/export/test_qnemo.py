"""`.qnemo`: what NeMo looks for, as a directory and as one file."""

import gzip
import io
import json
import shutil
import tarfile

import pytest

from mqat.checkpoints.archive import unpacked
from mqat.export.export import export_trtllm
from mqat.verify.verify import verify_export
from tests.unit.export.checkpoints import describe
from tests.unit.export.test_export import contents


@pytest.fixture
def sentencepiece(tiny, tmp_path):
    """A checkpoint whose tokenizer is a SentencePiece model."""
    checkpoint = shutil.copytree(tiny("int8"), tmp_path / "checkpoint")
    (checkpoint / "tokenizer" / "tokenizer.model").write_bytes(b"pieces")
    describe(checkpoint)
    return checkpoint


@pytest.fixture
def huggingface(tiny, tmp_path):
    checkpoint = shutil.copytree(tiny("int8"), tmp_path / "checkpoint")
    (checkpoint / "tokenizer" / "tokenizer_config.json").write_text("{}")
    describe(checkpoint)
    return checkpoint


def test_a_directory_describes_a_sentencepiece_tokenizer(sentencepiece, tmp_path):
    import yaml

    out = tmp_path / "model.qnemo"
    export_trtllm(sentencepiece, out, tensor_parallel=2, archive="directory")
    described = yaml.safe_load((out / "tokenizer_config.yaml").read_text())
    assert described["library"] == "sentencepiece" and described["type"] is None
    assert (out / described["model"]).read_bytes() == b"pieces"
    assert verify_export(out, reference=sentencepiece).ok


def test_a_huggingface_tokenizer_needs_no_description(huggingface, tmp_path):
    export_trtllm(huggingface, tmp_path / "q", tensor_parallel=1, archive="directory")
    export_trtllm(huggingface, tmp_path / "d", tensor_parallel=1)
    assert contents(tmp_path / "q") == contents(tmp_path / "d")


def test_a_tar_holds_the_directory_and_is_the_same_every_time(sentencepiece, tmp_path):
    export_trtllm(sentencepiece, tmp_path / "d", tensor_parallel=2, archive="directory")
    out = tmp_path / "model.qnemo"
    export_trtllm(sentencepiece, out, tensor_parallel=2, archive="tar")
    with tarfile.open(out) as archive:  # opens compressed ones too; the size tells
        members = {m.name: archive.extractfile(m).read() for m in archive if m.isfile()}
        assert all(name == "." or name.startswith("./") for name in archive.getnames())
    assert {f"./{name}": data for name, data in contents(tmp_path / "d").items()} == members
    assert out.stat().st_size > sum(map(len, members.values()))
    first = out.read_bytes()
    export_trtllm(sentencepiece, out, tensor_parallel=2, archive="tar", overwrite=True)
    assert out.read_bytes() == first
    assert sorted(f.name for f in tmp_path.iterdir()) == ["checkpoint", "d", "model.qnemo"]
    report = verify_export(out, reference=sentencepiece)
    assert report.ok and report.num_files == 2
    assert sorted(f.name for f in tmp_path.iterdir()) == ["checkpoint", "d", "model.qnemo"]


def test_a_damaged_archive_is_found(huggingface, tmp_path):
    out = tmp_path / "model.qnemo"
    export_trtllm(huggingface, out, tensor_parallel=1, archive="tar")
    data = bytearray(out.read_bytes())
    data[len(data) // 2] ^= 1
    out.write_bytes(data)
    assert not verify_export(out, reference=huggingface).ok
    for content in (b"not a tar", gzip.compress(b"cut off")[:20]):
        out.write_bytes(content)
        with pytest.raises(ValueError, match=r"model\.qnemo: not a \.qnemo archive"):
            verify_export(out)


def test_files_of_others_are_not_replaced_and_a_tokenizer_is_needed(huggingface, tiny, tmp_path):
    (tmp_path / "thesis").write_text("years of work")
    with pytest.raises(ValueError, match="is not an export of mqat"):
        export_trtllm(
            huggingface, tmp_path / "thesis", tensor_parallel=1, archive="tar", overwrite=True
        )
    foreign = {
        "./config.json": b'{"producer": {"name": "modelopt"}}',
        "./rank0.safetensors": b"weights",
    }
    with tarfile.open(tmp_path / "theirs.qnemo", "w") as archive:
        for name, data in foreign.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    before = (tmp_path / "theirs.qnemo").read_bytes()
    with pytest.raises(ValueError, match="is not an export of mqat"):
        export_trtllm(
            huggingface, tmp_path / "theirs.qnemo", tensor_parallel=1, archive="tar", overwrite=True
        )
    assert (tmp_path / "theirs.qnemo").read_bytes() == before
    with pytest.raises(ValueError, match="needs the tokenizer"):
        export_trtllm(tiny("int8"), tmp_path / "out", tensor_parallel=1, archive="tar")
    assert json.loads((huggingface / "mqat.json").read_text())  # control: still there


@pytest.mark.parametrize("kind", ["above", "link"])
def test_archives_reach_nothing_outside(kind, tmp_path):
    archive = tmp_path / "evil.qnemo"
    with tarfile.open(archive, "w") as tar:
        member = tarfile.TarInfo("../proof" if kind == "above" else "rank0.safetensors")
        if kind == "link":
            member.type, member.linkname = tarfile.SYMTYPE, "/etc/hostname"
        tar.addfile(member)
    with pytest.raises(ValueError, match="no file or folder inside the archive"), unpacked(archive):
        pass
    assert [f.name for f in tmp_path.iterdir()] == ["evil.qnemo"]

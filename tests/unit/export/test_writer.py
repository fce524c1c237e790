import resource
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import save_file

from mqat.export.stream import TensorPlan, write_safetensors
from mqat.export.writer import AtomicDirectory

OLD, NEW = (f'{{"producer": {{"name": "mqat", "version": "{v}"}}}}' for v in ("1", "2"))


@contextmanager
def largest_file(size):
    """No file may grow beyond `size` bytes: the same system call fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def plan(name, tensor, cuts=1):
    """A tensor that arrives in several blocks of rows."""
    blocks = tensor.chunk(cuts) if tensor.dim() else (tensor,)
    return TensorPlan(tensor.dtype, tuple(tensor.shape), lambda: iter(blocks), name)


@pytest.mark.parametrize("cuts", [1, 3])
def test_files_are_those_of_the_safetensors_package(cuts, tmp_path):
    tensors = {}
    for number, dtype in enumerate(
        (torch.float8_e4m3fn, torch.int8, torch.float32, torch.bfloat16, torch.uint8,
         torch.int64, torch.float16, torch.int32)
    ):  # fmt: skip
        values = torch.randn(7, 5, generator=torch.Generator().manual_seed(number)) * 9
        tensors |= {f"b.{number}": values.to(dtype), f"a.{number}": torch.zeros(()).to(dtype)}
        tensors[f"é.{number}"] = torch.empty(0, 3, dtype=dtype)
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    write_safetensors(tmp_path / "ours", [plan(n, t, cuts) for n, t in tensors.items()])
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_blocks_that_do_not_fill_the_planned_shape_are_refused(tmp_path):
    short = TensorPlan(torch.float32, (4, 2), lambda: iter([torch.zeros(3, 2)]), "weight")
    with pytest.raises(AssertionError, match="weight: 24 of 32 bytes"):
        write_safetensors(tmp_path / "file", [short])


def export(target, content="{}", **kwargs):
    directory = AtomicDirectory(target, **{"overwrite": False} | kwargs)
    directory.create()
    directory.write_text("config.json", content)
    directory.commit()


def test_nothing_is_visible_before_the_commit(tmp_path):
    directory = AtomicDirectory(tmp_path / "out", overwrite=False)
    directory.create()
    directory.write_text("config.json", "{}")
    assert not (tmp_path / "out").exists()
    directory.commit()
    assert [f.name for f in tmp_path.iterdir()] == ["out"]


def test_an_existing_directory_is_replaced_only_on_request(tmp_path):
    export(tmp_path / "out", OLD)
    with pytest.raises(ValueError, match="exists already"):
        export(tmp_path / "out", NEW)
    export(tmp_path / "out", NEW, overwrite=True)
    assert (tmp_path / "out" / "config.json").read_text() == NEW
    assert [f.name for f in tmp_path.iterdir()] == ["out"]


def test_what_is_not_an_export_is_never_replaced(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("years of work")
    for target in (tmp_path / "home", tmp_path / "home" / "thesis.txt"):
        with pytest.raises(ValueError, match="is not an export of mqat"):
            export(target, overwrite=True)
    assert (tmp_path / "home" / "thesis.txt").read_text() == "years of work"


def test_the_model_somebody_else_wrote_is_never_replaced(tmp_path):
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="is not an export of mqat"):
        export(tmp_path / "hub", overwrite=True)
    assert (tmp_path / "hub" / "config.json").read_text() == '{"model_type": "llama"}'


def test_an_empty_directory_may_be_used_as_target(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    export(tmp_path / "x" / ".." / "out", overwrite=True)
    assert (tmp_path / "out" / "config.json").exists()


def test_leftovers_of_a_killed_run_are_removed(tmp_path):
    (tmp_path / ".out.tmp").mkdir()
    (tmp_path / ".out.tmp" / "rank9.safetensors").write_text("half")
    export(tmp_path / "out")
    assert sorted(f.name for f in tmp_path.rglob("*")) == ["config.json", "out"]


def test_a_full_disk_is_one_error_that_names_the_file(tmp_path):
    directory = AtomicDirectory(tmp_path / "out", overwrite=False)
    directory.create()
    source = tmp_path / "tokenizer"
    source.mkdir()
    (source / "tokenizer.json").write_bytes(bytes(200_000))
    with largest_file(100_000):
        with pytest.raises(ValueError, match=r"rank0\.safetensors: .*is the disk full"):
            directory.write_tensors("rank0.safetensors", [plan("weight", torch.zeros(100_000))])
        with pytest.raises(ValueError, match=r"config\.json: .*is the disk full"):
            directory.write_text("config.json", " " * 200_000)
        with pytest.raises(ValueError, match=r"tokenizer\.json: .*is the disk full"):
            directory.copy_tree(source)
    directory.discard()
    assert sorted(f.name for f in tmp_path.iterdir()) == ["tokenizer"]

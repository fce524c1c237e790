import json
import os
import pickle
import random
import shutil

import pytest
import torch

from mqat.checkpoints.reader import CheckpointReader
from mqat.errors import UserError
from mqat.export.export import export_trtllm
from tests.unit.export.checkpoints import (
    TINY,
    UNTIED,
    all_layers,
    describe,
    tensors_of,
    write_checkpoint,
)

FC1 = "decoder.layers.mlp.linear_fc1.weight"


@pytest.fixture(scope="module")
def chunked(tmp_path_factory):
    path = tmp_path_factory.mktemp("chunked") / "checkpoint"
    return write_checkpoint(path, TINY, all_layers("int8"), cuts=3)


@pytest.fixture
def damaged(tiny, tmp_path):
    """A copy of a checkpoint that a test may break."""
    return shutil.copytree(tiny("int8"), tmp_path / "checkpoint")


def test_any_region_of_a_chunked_tensor_is_the_saved_region(chunked):
    saved = tensors_of(TINY, all_layers("int8"))
    reader = CheckpointReader(chunked)
    choose = random.Random(0)
    for _ in range(60):
        key = choose.choice(sorted(saved))
        region = []
        for size in saved[key].shape[: choose.randint(0, saved[key].dim())]:
            start = choose.randrange(size)
            region.append(slice(start, choose.randint(start, size)))
        assert torch.equal(reader.read(key, region), saved[key][tuple(region)]), (key, region)


def test_shapes_schemes_and_sizes_come_from_the_description(chunked):
    reader = CheckpointReader(chunked)
    assert reader.model == TINY
    assert reader.layers == all_layers("int8")
    assert reader.shape(FC1) == (4, 1024, 256)
    assert reader.has(FC1) and not reader.has("output_layer.weight")


@pytest.mark.parametrize(
    "stray",
    [
        "decoder.layers.self_attention.q_layernorm.weight",
        "decoder.layers.self_attention.linear_qkv.bias",
        "decoder.layers.mlp.linear_fc1.layer_norm_bias",
        "quantizers.decoder.layers.0.mlp.linear_fc1.output_scale",
        "output_layer.weight",
    ],
)
def test_a_tensor_without_a_place_is_refused_by_readers_and_exporters(stray, tmp_path):
    """A model with norms, biases or a head that its description does not mention would lose them."""
    tensors = tensors_of(TINY, all_layers("int8"))
    optimizer = {"optimizer.state.exp_avg": torch.ones(4)}  # control: it is not the model's
    CheckpointReader(
        write_checkpoint(tmp_path / "a", TINY, all_layers("int8"), tensors=tensors | optimizer)
    )
    with_stray = tensors | optimizer | {stray: torch.ones(4, 64)}
    path = write_checkpoint(tmp_path / "b", TINY, all_layers("int8"), tensors=with_stray)
    with pytest.raises(UserError, match=f"{stray} have no place in the model described"):
        CheckpointReader(path)
    with pytest.raises(UserError, match=f"{stray} have no place in the model described"):
        export_trtllm(path, tmp_path / "out", tensor_parallel=1)
    assert not (tmp_path / "out").exists()


def test_an_index_that_calls_a_function_is_refused_and_not_run(damaged, tmp_path):
    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "proof"),)

    (damaged / ".metadata").write_bytes(pickle.dumps(Attack()))
    describe(damaged)
    with pytest.raises(ValueError, match=r"\.metadata: not a checkpoint index .*mkdir"):
        CheckpointReader(damaged)
    assert not (tmp_path / "proof").exists()


@pytest.mark.parametrize("name", ["os", "Path", "FileSystemWriter", "pickle"])
def test_what_an_index_module_imports_is_refused_too(damaged, name):
    module = "torch.distributed.checkpoint.filesystem"
    (damaged / ".metadata").write_bytes(f"c{module}\n{name}\n.".encode())
    describe(damaged)
    with pytest.raises(ValueError, match="does not belong in a checkpoint index"):
        CheckpointReader(damaged)


def test_an_unfinished_checkpoint_is_refused(damaged):
    (damaged / "mqat.json").unlink()
    with pytest.raises(ValueError, match=r"not a complete mqat checkpoint \(mqat\.json is missing"):
        CheckpointReader(damaged)


@pytest.mark.parametrize("key", ["files", "model", "quantization"])
def test_a_description_without_a_key_is_refused(damaged, key):
    description = json.loads((damaged / "mqat.json").read_text())
    del description[key]
    (damaged / "mqat.json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match=rf"mqat\.json: damaged .*{key}"):
        CheckpointReader(damaged)


def data_file(checkpoint):
    return next(iter(sorted(checkpoint.glob("*.distcp"))))


def test_a_missing_truncated_or_changed_file_is_named(damaged):
    file = data_file(damaged)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{file.name}: contents do not match the checksum"):
        CheckpointReader(damaged)
    file.write_bytes(content[:-100])
    with pytest.raises(ValueError, match=rf"{file.name}: .* expected {len(content)} bytes"):
        CheckpointReader(damaged)
    file.unlink()
    with pytest.raises(ValueError, match=rf"{file.name}: missing"):
        CheckpointReader(damaged)


def test_a_damaged_record_is_an_error_even_without_the_checksum(damaged):
    file = data_file(damaged)
    file.write_bytes(bytes(file.stat().st_size))
    reader = CheckpointReader(damaged, crc="none")
    with pytest.raises(ValueError, match=rf"{file.name}: record of .* cannot be read"):
        reader.read(FC1)


def test_a_tensor_that_is_missing_or_of_another_size_is_named(tmp_path):
    tensors = tensors_of(UNTIED, {})
    del tensors["output_layer.weight"]
    with pytest.raises(ValueError, match=r"'output_layer.weight' is missing"):
        CheckpointReader(write_checkpoint(tmp_path / "a", UNTIED, {}, tensors=tensors))
    tensors = tensors_of(TINY, {})
    tensors[FC1] = tensors[FC1][:, :-1].contiguous()
    with pytest.raises(ValueError, match=r"linear_fc1.weight' has shape \(4, 1023, 256\)"):
        CheckpointReader(write_checkpoint(tmp_path / "b", TINY, {}, tensors=tensors))


def test_a_quantized_checkpoint_without_one_of_its_scales_is_refused(tmp_path):
    tensors = tensors_of(TINY, all_layers("int8"))
    name = "quantizers.decoder.layers.2.mlp.linear_fc2.input_scale"
    del tensors[name]
    path = write_checkpoint(tmp_path / "c", TINY, all_layers("int8"), tensors=tensors)
    with pytest.raises(ValueError, match=name):
        CheckpointReader(path)


def test_chunks_that_leave_a_gap_are_an_error(chunked):
    reader = CheckpointReader(chunked)
    del reader._tensors[FC1].chunks[4]
    with pytest.raises(ValueError, match=rf"chunks of '{FC1}' do not cover the tensor"):
        reader.read(FC1)


def index_with(damaged, owner, name):
    """An index that is one call of `getattr`, as some releases of Python pickle members."""
    text = f"cbuiltins\ngetattr\n(c{owner[0]}\n{owner[1]}\nV{name}\ntR."
    (damaged / ".metadata").write_bytes(text.encode())
    describe(damaged)


METADATA = "torch.distributed.checkpoint.metadata"


def test_members_of_enumerations_pickled_by_python_3_11_2_are_read(damaged):
    index_with(damaged, (METADATA, "_MEM_FORMAT_ENCODING"), "TORCH_CONTIGUOUS_FORMAT")
    with pytest.raises(ValueError) as caught:  # it is a member, not an index, but it is let through
        CheckpointReader(damaged)
    assert "does not belong" not in str(caught.value)


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        ((METADATA, "_MEM_FORMAT_ENCODING"), "__class__"),
        ((METADATA, "Metadata"), "__init__"),
        (("pathlib", "PosixPath"), "unlink"),
    ],
)
def test_getattr_reaches_nothing_but_members(damaged, owner, name):
    index_with(damaged, owner, name)
    with pytest.raises(ValueError, match="does not belong in a checkpoint index"):
        CheckpointReader(damaged)

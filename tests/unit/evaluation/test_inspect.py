"""`mqat inspect`: the same figures from a checkpoint and from its exports."""

import json

import pytest

from mqat.evaluation.inspect import COLUMNS, rows
from mqat.export.export import export_hf, export_trtllm


@pytest.mark.parametrize(
    ("algorithm", "bits", "form"),
    [
        ("null", 32, "unquantized float32"),
        ("int8", 8, "int8: int8 per channel, inputs int8_full"),
        ("int4", 4, "int4: int4 per group:64"),
        ("fp8", 8, "fp8: fp8_e4m3 per tensor, inputs fp8_e4m3"),
    ],
)
def test_a_checkpoint(algorithm, bits, form, tiny):
    found = list(rows(tiny(algorithm)))
    assert len(found) == 4 * 4
    down = found[-1]
    assert down.linear == "decoder.layers.3.mlp.linear_fc2" and down.shape == (256, 512)
    assert down.form == form and bits <= down.bits < bits + 0.6
    assert len(down.cells()) == len(COLUMNS)


@pytest.mark.parametrize(
    ("algorithm", "form", "bits"),
    [
        ("int8", "W8A8_SQ_PER_CHANNEL", 8),
        ("int4", "W4A16_AWQ", 4),
        ("null", "unquantized bfloat16", 16),
    ],
)
def test_rank_files(algorithm, form, bits, tiny, tmp_path):
    export_trtllm(tiny(algorithm), tmp_path / "out", tensor_parallel=2)
    found = list(rows(tmp_path / "out"))
    assert len(found) == 2 * 4 * 5 and {row.form for row in found} == {form}
    proj = next(row for row in found if row.linear == "transformer.layers.3.mlp.proj")
    assert proj.shape == (256, 256) and bits <= proj.bits < bits + 0.6
    assert found[-1].file == "rank1.safetensors"


@pytest.mark.parametrize(
    ("algorithm", "form", "bits"),
    [
        ("int8", "int8 per channel, inputs static int8", 8),
        ("int8_wo", "int8 per channel, packed", 8),
        ("int4", "int4 per group:64, packed", 4),
        ("fp8", "fp8 per tensor, inputs static fp8", 8),
        ("null", "unquantized bfloat16", 16),
    ],
)
def test_huggingface_directories_show_the_checkpoints_scales(algorithm, form, bits, tiny, tmp_path):
    export_hf(tiny(algorithm), tmp_path / "out")
    found = {row.linear: row for row in rows(tmp_path / "out")}
    assert len(found) == 4 * 7 and {row.form for row in found.values()} == {form}
    down, trained = found["model.layers.3.mlp.down_proj"], list(rows(tiny(algorithm)))[-1]
    assert down.shape == trained.shape and bits <= down.bits < bits + 0.6
    assert down.cells()[5:] == trained.cells()[5:]
    assert (down.cells()[5] == "-") == (algorithm == "null")


def test_what_cannot_be_read_is_an_error_that_says_why(tiny, tmp_path):
    export_hf(tiny("int8"), tmp_path / "out")
    (tmp_path / "out" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors: missing"):
        list(rows(tmp_path / "out"))
    with pytest.raises(ValueError, match=r"config\.json: unreadable"):
        list(rows(tmp_path))
    with pytest.raises(ValueError, match="nowhere: no such file or directory"):
        list(rows(tmp_path / "nowhere"))
    export_trtllm(tiny("int8"), tmp_path / "ranks", tensor_parallel=1)
    config = json.loads((tmp_path / "ranks" / "config.json").read_text())
    (tmp_path / "ranks" / "config.json").write_text(json.dumps(config | {"hidden_size": 0}))
    with pytest.raises(ValueError, match="hidden_size=0"):
        list(rows(tmp_path / "ranks"))


@pytest.mark.parametrize("algorithm", ["int4", "w_uint4_asym", "int8", "fp8"])
def test_a_checkpoint_has_the_bits_of_its_export(algorithm, tiny, tmp_path):
    """Scales are counted as they are served: INT4 in groups of 64 on bfloat16's grid has 4.25 bits."""
    export_hf(tiny(algorithm), tmp_path / "out")
    served = list(rows(tmp_path / "out"))[-1]
    trained = list(rows(tiny(algorithm)))[-1]
    assert served.linear.endswith("down_proj") and trained.linear.endswith("linear_fc2")
    assert trained.bits == pytest.approx(served.bits, abs=0.005)
    if algorithm == "int4":
        assert trained.bits == 4.25

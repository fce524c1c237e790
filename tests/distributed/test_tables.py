"""Quantized embedding and output layer: rows cut over ranks, padded vocabulary, every layout alike."""

import pytest
import torch

from mqat.checkpoints.reader import CheckpointReader
from mqat.evaluation.inspect import rows
from mqat.export.export import export_hf
from tests.distributed.test_layouts import run
from tests.distributed.worker import MODEL

TABLES = ["--untied", "--algorithm", "null", "--tables"]
LAYOUTS = {
    "tp1": (1, []),
    "tp2": (2, ["--tp", "2"]),
    "tp2-sp": (2, ["--tp", "2", "--sp"]),
    "pp2": (2, ["--pp", "2"]),
    "dp2": (2, []),
}
KEYS = [
    "embedding.word_embeddings.weight_scale",
    "output_layer.weight_scale",
    "output_layer.input_scale",
]


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    jobs = {name: (count, [*options, *TABLES]) for name, (count, options) in LAYOUTS.items()}
    jobs["dp2-unreduced"] = (2, [*TABLES, "--unreduced"])
    return run(tmp_path_factory.mktemp("tables"), jobs)


def scales(jobs, name, checkpoint="ptq"):
    reader = CheckpointReader(jobs[name][0] / checkpoint)
    assert list(reader.tables) == ["embedding.word_embeddings", "output_layer"]
    return [reader.read(f"quantizers.{key}") for key in KEYS]


@pytest.mark.parametrize("name", list(LAYOUTS)[1:])
def test_scales_are_bit_equal_and_losses_alike_on_every_layout(jobs, name):
    expected, found = scales(jobs, "tp1"), scales(jobs, name)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert found[0].shape == (302, 2) and found[1].shape == (302,)  # one row is padding
    assert found[0][:301].unique().numel() > 20 and found[1][:301].unique().numel() > 200
    expected, found = jobs["tp1"][1], jobs[name][1]
    assert found["unquantized"] == pytest.approx(expected["unquantized"], rel=1e-6)
    # float32 sums in another order flip single codes of the output layer's input
    assert found["quantized"] == pytest.approx(expected["quantized"], rel=1e-5)
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-3)
    assert found["grad_norms"][0] == pytest.approx(expected["grad_norms"][0], rel=1e-2)
    assert abs(found["quantized"] / found["unquantized"] - 1) > 1e-4  # control: it is quantized


def test_inputs_of_the_output_layer_need_the_reduction(jobs):
    assert not torch.equal(scales(jobs, "dp2-unreduced")[2], scales(jobs, "tp1")[2])


@pytest.mark.parametrize("name", LAYOUTS)
def test_training_keeps_the_scales_and_resumes_bit_for_bit(jobs, name):
    before, after = scales(jobs, name), scales(jobs, name, "qat")
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert jobs[name][1]["resumed_alike"]


def test_inspect_lists_the_tables_and_export_refuses_them(jobs, tmp_path):
    checkpoint = jobs["tp2-sp"][0] / "qat"
    found = {row.linear: row for row in rows(checkpoint)}
    head, embedding = found["output_layer"], found["embedding.word_embeddings"]
    assert head.form == "custom: int8 per channel, inputs int8_full"
    assert head.shape == embedding.shape == (MODEL.vocab_size, MODEL.hidden_size)
    assert embedding.form == "int4: int4 per group:64"
    with pytest.raises(ValueError, match="is quantized, which no export format here holds"):
        export_hf(checkpoint, tmp_path / "out")

"""A rank that imports holds its own shard and one tensor more, whoever saved the model."""

import ctypes
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from mqat.checkpoints.pretrained import load_pretrained_
from mqat.checkpoints.source import open_pretrained
from mqat.export.export import export_checkpoint, export_hf
from mqat.export.exporter import ExportOptions
from mqat.export.exporters import exporter
from tests.unit.export.checkpoints import write_checkpoint
from tests.unit.export.test_memory import WIDE, growth

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
TP, M_MMAP_THRESHOLD = 4, -3
DEEP = replace(WIDE, num_layers=12, vocab_size=8192)


def rank_of(model, dtype):
    """A rank's parameters, under the names of a built model, with what the loader asks it."""
    parameters = {}
    for layer in range(model.num_layers):
        prefix = f"decoder.layers.{layer}."
        for linear in model.linears:
            rows, cols = linear.shape(model)
            cut = (rows // TP, cols) if linear.parallel == "column" else (rows, cols // TP)
            parameters[f"{prefix}{linear.name}.weight"] = torch.ones(cut, dtype=dtype)
        for norm in model.norms:
            parameters[f"{prefix}{norm.name}.weight"] = torch.ones(model.hidden_size, dtype=dtype)
    table = torch.ones(model.vocab_size // TP, model.hidden_size, dtype=dtype)
    parameters["embedding.word_embeddings.weight"] = table
    parameters["decoder.final_layernorm.weight"] = torch.ones(model.hidden_size, dtype=dtype)
    layers = [SimpleNamespace(layer_number=number + 1) for number in range(model.num_layers)]
    group = SimpleNamespace(rank=lambda: 1, size=lambda: TP)
    return SimpleNamespace(
        pg_collection=SimpleNamespace(tp=group),
        decoder=SimpleNamespace(layers=layers),
        named_parameters=parameters.items,
    )


@pytest.mark.slow
@pytest.mark.parametrize("form", ["nemo", "hf"])
def test_a_rank_holds_its_shard_and_one_tensor(form, tmp_path):
    checkpoint = write_checkpoint(tmp_path / "c", DEEP, {}, dtype=torch.bfloat16)
    out = tmp_path / "model.nemo"
    if form == "hf":
        export_hf(checkpoint, out)
    else:
        (checkpoint / "tokenizer").mkdir(exist_ok=True)
        export_checkpoint(exporter("nemo"), checkpoint, out, ExportOptions())
    # Tensors get pages of their own, so that what is freed is not kept for later by malloc.
    assert ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 18) == 1
    source, rank = open_pretrained(out), rank_of(DEEP, torch.bfloat16)
    load_pretrained_([rank], source)  # what libraries allocate once
    shard = sum(t.numel() * 2 for _, t in rank.named_parameters())
    largest = 2 * max(t.numel() for _, t in rank.named_parameters())
    grown = growth(lambda: load_pretrained_([rank], open_pretrained(out)))
    assert grown < 8 * largest  # pieces as stored, and joined
    assert 16 * largest < shard  # control: holding the shard a second time would be seen

    def whole():
        names = ("gate_proj", "up_proj", "down_proj")
        kept = [
            source.read(f"model.layers.{i}.mlp.{n}.weight", slice(None), slice(None)).clone()
            for n in names for i in range(12)
        ]  # fmt: skip
        assert len(kept) == 36

    assert growth(whole) > 8 * largest  # control: the sampler sees what is held

"""A `.nemo` holds the trained weights as Megatron-Core loads them, and reads back as it was."""

import shutil
import tarfile
from dataclasses import replace

import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml
from safetensors.torch import load_file

from mqat.checkpoints.reader import CheckpointReader
from mqat.checkpoints.source import open_pretrained
from mqat.data.tokenizer import load_tokenizer, save_tokenizer, train_small_tokenizer
from mqat.export.export import export_checkpoint, export_hf
from mqat.export.exporter import ExportOptions
from mqat.export.exporters import exporter
from mqat.export.nemo.model_config import check_model
from mqat.models.decoder import DecoderConfig
from mqat.models.hf_keys import hf_shapes
from tests.unit.checkpoints.test_describe import own_model
from tests.unit.checkpoints.test_training_checkpoints import sentencepiece_model
from tests.unit.export.checkpoints import (
    BIASED,
    QWEN2,
    TINY,
    UNTIED,
    all_layers,
    describe,
    write_checkpoint,
)

NEMO = exporter("nemo")
MODELS = {"tied": TINY, "untied": UNTIED, "biased": BIASED, "qwen2": QWEN2}


@pytest.fixture
def make(tmp_path):
    """`make("tied", "int8")`: a checkpoint with a tokenizer."""

    def checkpoint(name="tied", algorithm="null"):
        path = tmp_path / f"{name}-{algorithm}"
        model = MODELS[name]
        write_checkpoint(path, model, all_layers(algorithm, model))
        shutil.rmtree(path / "tokenizer", ignore_errors=True)
        save_tokenizer(train_small_tokenizer(["to be or not to be"], 300), path / "tokenizer")
        describe(path)
        return path

    return checkpoint


def export(checkpoint, out, dtype="float32", **options):
    export_checkpoint(NEMO, checkpoint, out, ExportOptions(dtype=dtype), **options)
    return out


@pytest.mark.parametrize("name", MODELS)
def test_what_is_written_reads_back(make, tmp_path, name):
    checkpoint = make(name)
    source = open_pretrained(export(checkpoint, tmp_path / "model.nemo"))
    wanted = MODELS[name].to_dict() | {"token_ids": {}, "rope_theta": 1e4}
    assert source.config == DecoderConfig.from_dict(wanted)
    reader = CheckpointReader(checkpoint)
    for key in (
        "decoder.layers.self_attention.linear_proj.weight",
        "embedding.word_embeddings.weight",
    ):
        stored = reader.read(key)
        hf, found = "model.embed_tokens.weight", stored[: source.config.vocab_size]
        if "layers" in key:
            hf, found = "model.layers.2.self_attn.o_proj.weight", stored[2]
        assert torch.equal(source.read(hf, slice(None), slice(None)), found)
    assert set(hf_shapes(source.config)) == {
        n for n, shape in hf_shapes(source.config).items()
        if source.read(n, slice(None), slice(None) if len(shape) > 1 else None).shape == shape
    }  # fmt: skip
    tokenizer = load_tokenizer(source.tokenizer_source)
    assert tokenizer.get_vocab() == load_tokenizer(checkpoint / "tokenizer").get_vocab()
    assert tokenizer.chat_template == load_tokenizer(checkpoint / "tokenizer").chat_template


OTHERS = {
    "nemotron": {"rotary_fraction": 0.5},
    "starcoder2": {"biases": tuple(linear.name for linear in TINY.linears)},
    "gpt2": {
        "biases": tuple(linear.name for linear in TINY.linears), "num_query_groups": 4,
        "num_attention_heads": 4, "head_dim": TINY.hidden_size // 4,
    },
}  # fmt: skip


@pytest.mark.parametrize("family", OTHERS)
def test_families_that_differ_from_llama_read_back_without_a_description(make, tmp_path, family):
    """`model_config.yaml` says their norms, activation, positions and biases."""
    model = replace(TINY, family=family, **OTHERS[family])
    checkpoint = write_checkpoint(tmp_path / "c", model, {})
    shutil.rmtree(checkpoint / "tokenizer", ignore_errors=True)
    save_tokenizer(train_small_tokenizer(["to be or not to be"], 300), checkpoint / "tokenizer")
    describe(checkpoint)
    source = open_pretrained(export(checkpoint, tmp_path / "model.nemo"))
    assert source.config == replace(model, token_ids={})
    export_hf(checkpoint, tmp_path / "hf", dtype="float32")
    stored = load_file(tmp_path / "hf" / "model.safetensors")
    for name, shape in hf_shapes(model).items():
        found = source.read(name, slice(None), slice(None) if len(shape) > 1 else None)
        assert torch.equal(found, stored[name]), name


def test_torchs_own_reader_loads_every_tensor(make, tmp_path):
    checkpoint = make("biased")
    with tarfile.open(export(checkpoint, tmp_path / "model.nemo")) as archive:
        assert all(name == "." or name.startswith("./") for name in archive.getnames())
        archive.extractall(tmp_path / "unpacked")
    reader, weights = CheckpointReader(checkpoint), tmp_path / "unpacked" / "model_weights"
    shapes = BIASED.checkpoint_shapes()
    state = {f"model.{key}": torch.full(shape, torch.nan) for key, shape in shapes.items()}
    dcp.load(state, storage_reader=dcp.FileSystemReader(weights), no_dist=True)
    for key, shape in shapes.items():
        stored = reader.read(key, [slice(0, size) for size in shape])
        assert torch.equal(state[f"model.{key}"], stored.float()), key
    index = dcp.FileSystemReader(weights).read_metadata().state_dict_metadata
    assert set(index) == set(state)
    assert torch.load(weights / "common.pt", weights_only=True) == {}


def test_megatron_core_loads_it_into_a_model_of_its_own(make, tmp_path, world):
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.validation import StrictHandling

    checkpoint = make("untied")
    with tarfile.open(export(checkpoint, tmp_path / "model.nemo")) as archive:
        archive.extractall(tmp_path / "unpacked")
    model = own_model(
        {"num_layers": 4, "hidden_size": 256, "ffn_hidden_size": 512},
        vocab_size=301, share_embeddings_and_output_weights=False,
    )  # fmt: skip
    state = {"model": model.sharded_state_dict(prefix="model.")}
    said = yaml.safe_load((tmp_path / "unpacked" / "model_config.yaml").read_text())
    weights, strict = tmp_path / "unpacked" / "model_weights", said["dist_ckpt_load_strictness"]
    loaded = dist_checkpointing.load(state, str(weights), strict=StrictHandling(strict))
    found = {name.removeprefix("model."): t for name, t in loaded["model"].items()}
    reader = CheckpointReader(checkpoint)
    for name in ("self_attention.linear_qkv", "mlp.linear_fc1", "mlp.linear_fc2"):
        stored = reader.read(f"decoder.layers.{name}.weight")
        for layer in range(4):
            assert torch.equal(found[f"decoder.layers.{layer}.{name}.weight"], stored[layer])
    norms = reader.read("decoder.layers.mlp.linear_fc1.layer_norm_weight")
    assert torch.equal(found["decoder.layers.3.pre_mlp_layernorm.weight"], norms[3])
    assert torch.equal(found["output_layer.weight"], reader.read("output_layer.weight")[:301])


def test_several_processes_write_the_same_bytes(make, tmp_path):
    checkpoint = make()
    alone = export(checkpoint, tmp_path / "alone.nemo", dtype="bfloat16").read_bytes()
    assert alone == export(checkpoint, tmp_path / "again.nemo", dtype="bfloat16").read_bytes()
    contents = NEMO.contents(
        CheckpointReader(checkpoint), checkpoint / "tokenizer", ExportOptions()
    )
    assert len(contents.weights) == TINY.num_layers + 1  # files that processes share
    assert len(alone) < 0.6 * len(export(checkpoint, tmp_path / "wide.nemo").read_bytes())
    with pytest.raises(ValueError, match="exists already"):
        export(checkpoint, tmp_path / "alone.nemo")
    export(checkpoint, tmp_path / "alone.nemo", dtype="bfloat16", overwrite=True)
    (tmp_path / "other.nemo").write_bytes(b"of somebody else")
    with pytest.raises(ValueError, match="is not an export of mqat"):
        export(checkpoint, tmp_path / "other.nemo", overwrite=True)


def test_quantized_weights_are_written_as_trained_and_it_is_said(make, tmp_path):
    checkpoint = make(algorithm="int4")
    with pytest.warns(UserWarning, match="before they are rounded, and no scales"):
        out = export(checkpoint, tmp_path / "model.nemo")
    found = open_pretrained(out).read(
        "model.layers.0.mlp.down_proj.weight", slice(None), slice(None)
    )
    reader = CheckpointReader(checkpoint)
    assert torch.equal(found, reader.read("decoder.layers.mlp.linear_fc2.weight", [slice(0, 1)])[0])


def test_a_sentencepiece_tokenizer_is_named_as_nemo_finds_it(make, tmp_path):
    checkpoint = make()
    shutil.rmtree(checkpoint / "tokenizer")
    (checkpoint / "tokenizer").mkdir()
    (checkpoint / "tokenizer" / "tokenizer.model").write_bytes(sentencepiece_model())
    describe(checkpoint)
    out = export(checkpoint, tmp_path / "model.nemo")
    with tarfile.open(out) as archive:
        said = yaml.safe_load(archive.extractfile("./model_config.yaml").read())
        assert archive.extractfile("./tokenizer.model").read() == sentencepiece_model()
    assert said["tokenizer"]["library"] == "sentencepiece"
    assert said["tokenizer"]["model"] == "nemo:tokenizer.model"
    source = open_pretrained(out)
    assert load_tokenizer(source.tokenizer_source)("fox")["input_ids"]


@pytest.mark.parametrize(("changes", "message"), [
    ({"family": "qwen3"}, "builds no qwen3 model"),
    ({"biases": ("self_attention.linear_qkv", "self_attention.linear_proj")}, "biases on"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0,
      "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}}, "rope_scaling="),
])  # fmt: skip
def test_models_that_nemo_1_has_no_words_for_are_refused(changes, message):
    model = DecoderConfig.from_dict(UNTIED.to_dict() | changes)
    with pytest.raises(ValueError, match=f"export.format=nemo: .*{message}"):
        check_model(model)
    check_model(UNTIED)


@pytest.mark.parametrize("options", [
    {"tensor_parallel": 2}, {"pipeline_parallel": 2}, {"archive": "tar"}, {"max_shard_bytes": 10},
    {"allow_requantization": True},
])  # fmt: skip
def test_options_of_other_formats_are_refused(options):
    with pytest.raises(ValueError, match=r"export.format=nemo: loads at any layout"):
        NEMO.check(TINY, {}, ExportOptions(**options))

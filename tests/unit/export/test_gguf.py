"""A GGUF file holds what training multiplied by, as the `gguf` package and transformers read it."""

import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM

from mqat.checkpoints.gguf import GgufCheckpoint
from mqat.checkpoints.reader import CheckpointReader
from mqat.data.gguf_words import gguf_tokenizer_keys
from mqat.data.tokenizer import load_tokenizer, save_tokenizer, train_small_tokenizer
from mqat.errors import UserError
from mqat.export.export import export_checkpoint, export_hf
from mqat.export.exporter import ExportOptions
from mqat.export.exporters import exporter
from mqat.models.decoder import DecoderConfig
from mqat.quant.algorithm import named_scheme
from mqat.quant.formats import INT8
from mqat.quant.functional import dequantize, quantize
from mqat.quant.granularity import PerGroup
from mqat.quant.scheme import LinearScheme, TensorScheme
from tests.unit.export.checkpoints import (
    MIXTRAL,
    QWEN2,
    TINY,
    UNTIED,
    all_caches,
    all_layers,
    describe,
    tensors_of,
    write_checkpoint,
)

pytestmark = pytest.mark.filterwarnings("ignore:Q4_1 stores")
GGUF = exporter("gguf")
TEXT = "to be or not to be, that's the question of 1871 weavers  in two  blanks " + 9 * "1871 3333 "
MODELS = {
    "tied": TINY, "untied": UNTIED, "qwen2": QWEN2, "qwen3": replace(TINY, family="qwen3")
}  # fmt: skip
MODELS = {name: replace(model, num_layers=2) for name, model in MODELS.items()}
INT8_G32 = LinearScheme("q8_0", TensorScheme(INT8, PerGroup(32), torch.bfloat16), None)
# Type in the file -> scheme of all linears.
SCHEMES = {
    "Q8_0": INT8_G32,
    "Q4_0": named_scheme("int4", group_size=32),
    "Q4_1": named_scheme("w_uint4_asym", group_size=32),
}


def layers_of(scheme, model=TINY):
    return dict.fromkeys(all_layers("int8", model), scheme)


@pytest.fixture
def make(tmp_path):
    """`make("tied", "Q8_0")`: a checkpoint with a tokenizer."""

    def checkpoint(name="tied", kind=None, tensors=None):
        path = tmp_path / f"{name}-{kind}-{tensors is None}"
        model = MODELS[name]
        layers = {} if kind is None else layers_of(SCHEMES[kind], model)
        write_checkpoint(path, model, layers if tensors is None else {}, tensors=tensors)
        shutil.rmtree(path / "tokenizer", ignore_errors=True)
        save_tokenizer(train_small_tokenizer([TEXT], 300), path / "tokenizer")
        describe(path)
        return path

    return checkpoint


def export(checkpoint, out, dtype="float32"):
    export_checkpoint(GGUF, checkpoint, out, ExportOptions(dtype=dtype))
    return out / "model.gguf"


def trained(name, kind):
    """The tensors of a checkpoint with its weights on their grids."""
    model, layers = MODELS[name], layers_of(SCHEMES[kind], MODELS[name])
    state = tensors_of(model, layers)
    for full, scheme in layers.items():
        index, linear = full.removeprefix("decoder.layers.").split(".", 1)
        key, lead = model.place(model.linear(linear).key, int(index))
        weight, how = state[key][lead][0], scheme.weight
        frozen = {
            tensor: state.get(f"quantizers.{full}.weight_{tensor}")
            for tensor in ("scale", "zero_point")
        }
        scale, zero = frozen.values()
        codes = quantize(weight, scale, how.format, how.granularity, zero_point=zero)
        floats = {"zero_point": zero, "fmt": how.format}
        weight.copy_(dequantize(codes, scale, how.granularity, torch.float32, **floats))
    return {key: value for key, value in state.items() if not key.startswith("quantizers.")}


def read(source, name, tensor):
    return source.read(name, slice(None), slice(None) if tensor.dim() > 1 else None)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("untied", "Q8_0"), ("qwen2", "Q8_0"), ("qwen3", "Q4_0"), ("tied", "Q4_0"), ("tied", "Q4_1")],
)
def test_files_hold_what_training_multiplied_by(make, tmp_path, name, kind):
    source = GgufCheckpoint(export(make(name, kind), tmp_path / "gguf"))
    types = {tensor.tensor_type.name for _, tensor in source._tensors.values()}
    assert types == {"F32", kind}
    export_hf(make(name, kind, trained(name, kind)), tmp_path / "hf", dtype="float32")
    wanted = load_file(tmp_path / "hf" / "model.safetensors")
    assert len(wanted) >= 20
    export_hf(make(name), tmp_path / "raw", dtype="float32")
    raw = load_file(tmp_path / "raw" / "model.safetensors")
    for hf, tensor in wanted.items():
        found = read(source, hf, tensor)
        if kind == "Q4_1" and "proj.weight" in hf:  # offsets are rounded to float16
            assert (found - tensor).abs().max() <= tensor.abs().max() / 2048, hf
        else:
            assert torch.equal(found, tensor), hf
        if "proj.weight" in hf:
            assert not torch.allclose(found, raw[hf], atol=1e-4), hf  # control: it was quantized


@pytest.mark.parametrize("name", MODELS)
def test_what_is_written_unquantized_reads_back(make, tmp_path, name):
    checkpoint = make(name)
    source = GgufCheckpoint(export(checkpoint, tmp_path / "gguf"))
    family = "llama" if name in ("tied", "untied") else name
    wanted = MODELS[name].to_dict() | {"token_ids": {}, "family": family}
    found = source.config.to_dict() | {"token_ids": {}, "rms_norm_eps": 1e-5}
    assert source.config.rms_norm_eps == pytest.approx(1e-5)
    assert found == DecoderConfig.from_dict(wanted).to_dict()
    stored = CheckpointReader(checkpoint).read("decoder.layers.self_attention.linear_proj.weight")
    found = source.read("model.layers.1.self_attn.o_proj.weight", slice(None), slice(None))
    assert torch.equal(found, stored[1])


@pytest.mark.parametrize("name", ["untied", "qwen2"])
def test_transformers_computes_the_same_from_the_file(make, tmp_path, name):
    file = export(make(name, "Q8_0"), tmp_path / "gguf")
    export_hf(make(name, "Q8_0", trained(name, "Q8_0")), tmp_path / "hf", dtype="float32")
    tokens = torch.arange(3, 60)[None]
    options = {"dtype": torch.float32}
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, **options
        )  # fmt: skip
        wanted = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", **options)
        logits = found(tokens).logits[0]
        assert torch.allclose(logits, wanted(tokens).logits[0], atol=1e-5)
        assert not torch.allclose(logits, wanted(tokens + 1).logits[0], atol=1e-2)


def test_the_tokenizer_in_the_file_is_the_model_s(make, tmp_path):
    checkpoint = make()
    file = export(checkpoint, tmp_path / "gguf")
    own, other = load_tokenizer(checkpoint / "tokenizer"), load_tokenizer(file)
    assert own(TEXT)["input_ids"] == other(TEXT)["input_ids"]
    assert own.chat_template == other.chat_template
    assert own(TEXT)["input_ids"] != other(TEXT[1:])["input_ids"]


def test_the_rule_of_splitting_is_found_by_what_it_does(tmp_path):
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    for pattern, rule in ((None, "gpt-2"), (r"\p{N}", "smollm"), ("[aeiou]", None)):
        splits = [] if pattern is None else [pre_tokenizers.Split(Regex(pattern), "isolated")]
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer, backend.decoder = level, decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet)
        backend.train_from_iterator([TEXT] * 9, trainer)
        backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, level])
        backend.save(str(tmp_path / "tokenizer.json"))
        if rule is None:
            with pytest.raises(UserError, match="splits texts by none of the rules"):
                gguf_tokenizer_keys(tmp_path, {}, 301)
        else:
            assert gguf_tokenizer_keys(tmp_path, {}, 301)["tokenizer.ggml.pre"] == rule


@pytest.mark.parametrize(
    ("layers", "model", "message"),
    [
        (all_layers("fp8"), TINY, "cannot be exported to llama.cpp"),
        (all_layers("int4"), TINY, "Its blocks have 32 elements"),
        (all_layers("int8"), TINY, "leave inputs unquantized"),
        (all_caches("fp8"), TINY, "caches have no place"),
        ({}, MIXTRAL, "mixtral models are not written"),
        ({}, replace(TINY, sliding_window=8, windowed_layers=(0, 1, 2, 3), family="mistral"), "no keys"),
    ],
)  # fmt: skip
def test_what_a_file_cannot_hold_is_refused(layers, model, message):
    with pytest.raises(UserError, match=message):
        GGUF.check(model, layers, ExportOptions())
    GGUF.check(TINY, layers_of(INT8_G32), ExportOptions())


def test_rounded_offsets_are_said():
    warnings = [GGUF.warning(layers_of(scheme)) for scheme in SCHEMES.values()]
    assert warnings[:2] == [None, None] and "rounds it by 1/2048 at most" in warnings[2]


def test_steps_that_float16_would_round_are_refused(make, tmp_path):
    layers = layers_of(INT8_G32)
    tensors = tensors_of(TINY, layers)
    (key, *_) = [key for key in tensors if key.endswith("weight_scale")]
    tensors[key][0] = 2.0**-20 * 1.0078125
    path = tmp_path / "small"
    write_checkpoint(path, TINY, layers, tensors=tensors)
    save_tokenizer(train_small_tokenizer([TEXT], 300), path / "tokenizer")
    describe(path)
    with pytest.raises(UserError, match=r"do not fit llama.cpp's float16 exactly"):
        export(path, tmp_path / "gguf")
    assert not (tmp_path / "gguf").exists()

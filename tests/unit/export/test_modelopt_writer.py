"""The same weights and the same amax through nvidia-modelopt's own TensorRT-LLM exporter.

Optional: `pip install 'mqat[peers]'`. Its exporter runs on a CPU as it is. What it writes otherwise is
listed here, and nothing else may differ: `NOT_WRITTEN`, `OTHER_DTYPE`, `OTHER_CONFIG`, code -128.
"""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from mqat.export.export import export_hf, export_trtllm
from tests.unit.export.checkpoints import QWEN2, TINY, tensors_of, write_checkpoint
from tests.unit.verify.test_reader import TOKENS, all_layers, qkv_parts

pytestmark = pytest.mark.slow  # its import alone takes longer than all other tests of this folder

# A vocabulary of whole 64s, which it would pad for INT4; head and table apart, which it would share.
MODELS = {
    name: replace(model, vocab_size=320, num_layers=2, tie_word_embeddings=False)
    for name, model in (("llama", TINY), ("qwen2", QWEN2))
}
DECODERS = {"llama": "llama", "qwen2": "qwen"}
# Algorithm here -> its configuration, and largest codes of weight and input.
CONFIGS = {
    "null": (None, 0, 0),
    "fp8": ("FP8_DEFAULT_CFG", 448, 448),
    "int8": ("INT8_DEFAULT_CFG", 127, 127),
    "int4": ("INT4_BLOCKWISE_WEIGHT_ONLY_CFG", 7, 0),
}
# It declares formats with factors of the input, but writes them only where it has smoothed itself.
NOT_WRITTEN = {"int8": "prequant_scaling_factor", "int4": "prequant_scaling_factor"}
# Steps of INT4 are float32 there; here they are in the model's dtype, to which the loader casts them.
OTHER_DTYPE = {"int4": "weights_scaling_factor"}
# Weights that left the range in training may have the code -128 there; here it is -127, as trained.
# It names itself, and leaves rotary_base, rotary_scaling and biases to the loader's defaults (10000,
# none, none), which is another model unless they happen to be right. Engines' logits are float16.
OTHER_CONFIG = {"producer", "quantization", "logits_dtype"}


@pytest.fixture(scope="module")
def modelopt():
    reason = "optional: pip install 'mqat[peers]'"
    pytest.importorskip("modelopt.torch.export", reason=reason)
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_tensorrt_llm_checkpoint

    return mtq, export_tensorrt_llm_checkpoint


def amax_of(scale, largest):
    """float32 numbers that give `scale` bit for bit when divided by `largest`."""
    product = scale * largest
    for amax in (product.nextafter(torch.tensor(0.0)), product.nextafter(torch.tensor(1e9))):
        product = torch.where(amax / largest == scale, amax, product)
    assert torch.equal(product / largest, scale)
    return product


def load_amax(quantizer, amax):
    """In float32: assigning alone would keep the dtype of the calibrated buffer."""
    shape = quantizer.amax.shape
    quantizer.reset_amax()
    quantizer.amax = amax.reshape(shape)


def write_theirs(modelopt, directory, out, name, algorithm, state, tp):
    """Weights of an unquantized directory, quantizers with the checkpoint's scales, their exporter."""
    mtq, write = modelopt
    config, weight_max, input_max = CONFIGS[algorithm]
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).eval()
    if config is not None:
        mtq.quantize(model, getattr(mtq, config), lambda m: m(TOKENS % 300))
        for index, layer in enumerate(model.model.layers):
            a, m = layer.self_attn, layer.mlp
            owners = {
                "self_attention.linear_qkv": [a.q_proj, a.k_proj, a.v_proj],
                "self_attention.linear_proj": [a.o_proj],
                "mlp.linear_fc1": [m.gate_proj, m.up_proj],
                "mlp.linear_fc2": [m.down_proj],
            }
            for linear, modules in owners.items():
                prefix = f"quantizers.decoder.layers.{index}.{linear}."
                amax = amax_of(state[prefix + "weight_scale"], weight_max)
                if len(amax) == 1:
                    parts = [amax] * len(modules)
                elif len(modules) == 3:
                    parts = qkv_parts(amax, MODELS[name])
                else:
                    parts = amax.chunk(len(modules))
                for module, part in zip(modules, parts, strict=True):
                    load_amax(module.weight_quantizer, part)
                    if input_max:
                        step = state[prefix + "input_scale"]
                        load_amax(module.input_quantizer, amax_of(step, input_max))
    write(model, DECODERS[name], torch.bfloat16, out, inference_tensor_parallel=tp)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("algorithm", CONFIGS)
@pytest.mark.parametrize("name", MODELS)
def test_both_write_the_same(name, algorithm, tp, modelopt, tmp_path):
    model = MODELS[name]
    layers = all_layers(algorithm, model)
    if algorithm == "int4":  # its configuration has groups of 128
        from mqat.quant.algorithm import named_scheme

        layers = dict.fromkeys(layers, named_scheme("int4", group_size=128))
    state = tensors_of(model, layers, torch.bfloat16)
    plain = {key: value for key, value in state.items() if not key.startswith("quantizers.")}
    quantized = write_checkpoint(tmp_path / "quantized", model, layers, tensors=state)
    unquantized = write_checkpoint(tmp_path / "plain", model, {}, tensors=plain)
    export_hf(unquantized, tmp_path / "hf", dtype="bfloat16")
    export_trtllm(quantized, tmp_path / "ours", tensor_parallel=tp, dtype="bfloat16")
    write_theirs(modelopt, tmp_path / "hf", tmp_path / "theirs", name, algorithm, state, tp)

    for rank in range(tp):
        ours, theirs = (
            load_file(tmp_path / who / f"rank{rank}.safetensors") for who in ("ours", "theirs")
        )
        missing = NOT_WRITTEN.get(algorithm)
        left_out = {n for n in ours if missing and n.endswith(missing)}
        assert set(ours) - set(theirs) == left_out and set(theirs) <= set(ours)
        assert all((ours[n] == 1).all() for n in left_out)
        other = OTHER_DTYPE.get(algorithm)
        for key, tensor in theirs.items():
            found = ours[key]
            if other and key.endswith(other):
                assert (found.dtype, tensor.dtype) == (torch.bfloat16, torch.float32)
                found = found.float()
            assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape), key
            if algorithm == "int8" and key.endswith(".weight") and tensor.dtype == torch.int8:
                tensor = tensor.clamp(min=-127)  # weights that left the range in training
            same = torch.equal(found.view(torch.uint8), tensor.contiguous().view(torch.uint8))
            assert same, (key, found, tensor)
    ours, theirs = (
        json.loads((tmp_path / who / "config.json").read_text()) for who in ("ours", "theirs")
    )
    shared = (ours.keys() & theirs.keys()) - OTHER_CONFIG
    assert len(shared) > 15
    different = {key for key in shared if ours[key] != theirs[key]}
    assert different <= {"use_parallel_embedding"}  # of one rank: it makes no difference there
    algo = [config["quantization"]["quant_algo"] for config in (ours, theirs)]
    assert algo[0] == algo[1]

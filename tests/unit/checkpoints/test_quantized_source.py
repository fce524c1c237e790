"""Weights that are quantized already are dequantized as their own readers do, or refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mqat.checkpoints.source import open_pretrained
from mqat.models.hf_keys import hf_shapes
from tests.unit.checkpoints.malformed_sources import good, write_directory
from tests.unit.export.checkpoints import UNTIED, all_layers, tensors_of, write_checkpoint
from tests.unit.export.test_hf import export, mixture, projections, scheme_of, stored_linear

EVERYTHING = slice(None)
LINEARS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
WHERE = "ignore:.*are dequantized:UserWarning"
EXPERIMENT = [("int8", 64), ("int8_wo", 64), ("int4", 64), ("int4", 256), ("w_uint4_asym", 64),
              ("int8_pc_pt", 64), ("fp8", 64), ("fp8_pc_pt", 64)]  # fmt: skip


@pytest.mark.filterwarnings(WHERE)
@pytest.mark.parametrize(("algorithm", "group_size"), EXPERIMENT)
def test_compressed_tensors_are_dequantized_as_by_its_package(algorithm, group_size, tmp_path):
    pytest.importorskip("compressed_tensors", reason="optional: pip install 'mqat[hf]'")
    from compressed_tensors.compressors import BaseCompressor

    layers = all_layers(algorithm, UNTIED, group_size=group_size)
    out = tmp_path / "out"
    export(write_checkpoint(tmp_path / "c", UNTIED, layers), out)
    form = json.loads((out / "config.json").read_text())["quantization_config"]["format"]
    reader = BaseCompressor.load_from_registry(form)
    source = open_pretrained(out)
    trained = projections(UNTIED, tensors_of(UNTIED, layers), 1)
    assert hf_shapes(source.config) == hf_shapes(UNTIED)
    for name in LINEARS:
        stored = stored_linear(out, f"model.layers.1.{name}")
        wide = {
            k: t.float() if t.is_floating_point() and "scale" in k else t for k, t in stored.items()
        }
        expected = reader.decompress(wide, scheme_of(out))["weight"].float()
        full = f"model.layers.1.{name}.weight"
        assert torch.equal(source.read(full, EVERYTHING, EVERYTHING), expected)
        part = source.read(full, slice(33, 75), slice(100, 217))
        assert torch.equal(part, expected[33:75, 100:217])
        assert not torch.equal(expected, trained[name])  # control: rounded


@pytest.mark.filterwarnings(WHERE)
def test_a_mixture_of_forms_is_read_and_said(tmp_path):
    out = tmp_path / "out"
    export(write_checkpoint(tmp_path / "c", UNTIED, mixture()), out)
    with pytest.warns(
        UserWarning, match=r"27 weights quantized by compressed-tensors \(mixed-precision\)"
    ):
        source = open_pretrained(out)
    for name, shape in hf_shapes(source.config).items():
        columns = EVERYTHING if len(shape) > 1 else None
        assert source.read(name, EVERYTHING, columns).shape == shape


def directory(tmp_path: Any, change: Any, quantization: Any, **files: Any) -> Any:
    """A Llama model whose linears were changed as `change` says: (name, weight) -> tensors."""
    case = good("llama")
    tensors = {}
    for name, tensor in case.tensors.items():
        is_linear = "_proj" in name and name.endswith("weight")
        tensors |= change(name, tensor) if is_linear else {name: tensor}
    tmp_path.mkdir(exist_ok=True)
    path = write_directory(case, tmp_path / "model")
    save_file({name: t.contiguous() for name, t in tensors.items()}, path / "model.safetensors")
    config = json.loads((path / "config.json").read_text())
    if quantization is not None:
        config["quantization_config"] = quantization
    (path / "config.json").write_text(json.dumps(config))
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path, case.tensors


def in_blocks(name: str, weight: torch.Tensor, size: int = 20) -> dict[str, torch.Tensor]:
    """FP8 codes with a scale for each block; the last ones are short."""
    module = name.removesuffix(".weight")
    rows, cols = (-(-n // size) for n in weight.shape)
    scale, codes = torch.empty(rows, cols), torch.empty(weight.shape)
    for r in range(rows):
        for c in range(cols):
            block = (slice(r * size, (r + 1) * size), slice(c * size, (c + 1) * size))
            scale[r, c] = weight[block].abs().max() / 448
            codes[block] = weight[block] / scale[r, c]
    return {name: codes.to(torch.float8_e4m3fn), f"{module}.weight_scale_inv": scale}


@pytest.mark.filterwarnings(WHERE)
def test_fp8_blocks_are_dequantized_block_by_block(tmp_path):
    said = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [20, 20],
            "activation_scheme": "dynamic"}  # fmt: skip
    path, original = directory(tmp_path, in_blocks, said)
    source = open_pretrained(path)
    for name in ("model.layers.1.mlp.down_proj.weight", "model.layers.0.self_attn.k_proj.weight"):
        stored = in_blocks(name, original[name])
        scale = stored[name.replace("weight", "weight_scale_inv")]
        shape = original[name].shape
        full = scale.repeat_interleave(20, 0).repeat_interleave(20, 1)[: shape[0], : shape[1]]
        expected = stored[name].float() * full
        assert torch.equal(source.read(name, EVERYTHING, EVERYTHING), expected)
        assert torch.equal(source.read(name, slice(5, 14), slice(19, 30)), expected[5:14, 19:30])
        torch.testing.assert_close(expected, original[name], rtol=0.07, atol=1e-3)
    said["weight_block_size"] = [30, 30]
    path, _ = directory(tmp_path / "other", in_blocks, said)
    with pytest.raises(ValueError, match=r"scales for 48 .*fits no block size"):
        open_pretrained(path).read("model.layers.1.mlp.down_proj.weight", EVERYTHING, EVERYTHING)


def per_tensor(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    scale, module = weight.abs().max() / 448, name.removesuffix(".weight")
    return {name: (weight / scale).to(torch.float8_e4m3fn), f"{module}.weight_scale": scale,
            f"{module}.input_scale": torch.tensor(0.5)}  # fmt: skip


@pytest.mark.parametrize("beside", [True, False])
def test_modelopt_fp8_is_dequantized(tmp_path, beside):
    said = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8"}}
    inside = None if beside else {"quant_method": "modelopt", "quant_algo": "FP8"}
    path, original = directory(
        tmp_path, per_tensor, inside, **({"hf_quant_config": said} if beside else {})
    )
    with pytest.warns(
        UserWarning,
        match=r"ModelOpt \(FP8\) are dequantized .*14 scales of activations are left out",
    ):
        source = open_pretrained(path)
    name = "model.layers.1.self_attn.o_proj.weight"
    stored = per_tensor(name, original[name])
    expected = stored[name].float() * stored[name.replace("weight", "weight_scale")]
    assert torch.equal(source.read(name, EVERYTHING, EVERYTHING), expected)


def plain(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    return {name: weight}


@pytest.mark.parametrize(("said", "message"), [
    ({"quant_method": "awq", "bits": 4}, r"by AWQ \(4 bits\), which is not read; import the"),
    ({"quant_method": "gptq", "bits": 8}, r"by GPTQ \(8 bits\)"),
    ({"quant_method": "bitsandbytes", "load_in_4bit": True}, r"by bitsandbytes.*dequantize\(\)"),
    ({"load_in_8bit": True}, "by bitsandbytes"),
    ({"quant_method": "mxfp4"}, r"by MXFP4, .*dequantize\(\)"),
    ({"quant_method": "quark"}, "by AMD Quark"),
    ({"quant_method": "somebody"}, "by somebody, which is not read"),
    ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, r"by ModelOpt \(NVFP4\)"),
    ({"quant_method": "fp8", "fmt": "e5m2"}, "by FP8, which"),
    ({"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized", "config_groups": {
      "group_0": {"weights": {"num_bits": 4}}}}, r"by compressed-tensors \(nvfp4-pack-quantized\)"),
    ({"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {
      "group_0": {"weights": {"num_bits": 3}}}}, r"by compressed-tensors \(pack-quantized\)"),
    ({"quant_method": "fp8"}, "says that its weights are quantized by FP8, but no tensor holds codes"),
    ("yes", "is no description of quantized weights"),
])  # fmt: skip
def test_other_methods_are_refused_by_name(tmp_path, said, message):
    path, _ = directory(tmp_path, plain, said)
    with pytest.raises(ValueError, match=message) as error:
        open_pretrained(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("file", "content", "message"), [
    ("quantize_config", {"bits": 4, "group_size": 128}, r"by GPTQ \(4 bits\)"),
    ("quant_config", {"w_bit": 4}, "by AWQ"),
    ("hf_quant_config", {"quantization": {"quant_algo": "W4A16_AWQ"}}, r"by ModelOpt \(W4A16_AWQ\)"),
])  # fmt: skip
def test_a_method_that_only_a_file_beside_names_is_found(tmp_path, file, content, message):
    path, _ = directory(tmp_path, plain, None, **{file: content})
    with pytest.raises(ValueError, match=message):
        open_pretrained(path)


def test_codes_without_scales_and_grids_of_others_are_refused(tmp_path):
    said = {"quant_method": "fp8"}
    path, _ = directory(tmp_path, lambda n, w: {n: w.to(torch.float8_e4m3fn)}, said)
    with pytest.raises(ValueError, match="has codes and no scale beside it"):
        open_pretrained(path)
    with_global = lambda n, w: per_tensor(n, w) | {f"{n}_global_scale": torch.ones(1)}  # noqa: E731
    path, _ = directory(tmp_path / "second", with_global, said)
    with pytest.raises(ValueError, match="weight_global_scale belongs to a grid of FP8"):
        open_pretrained(path)

"""Which caches a target holds, and what its configuration says."""

import json

import pytest

from mqat.export.export import export_hf, export_trtllm
from mqat.export.kv_cache import check_exportable
from mqat.models.schemes import kv_cache_schemes
from tests.unit.export.checkpoints import TINY, all_caches, all_layers, write_checkpoint

HF = ["compressed-tensors", "modelopt"]


@pytest.mark.parametrize("target", HF)
def test_int8_caches_have_no_reader_outside_tensorrt_llm(target):
    caches = kv_cache_schemes(all_caches("int8"))
    with pytest.raises(ValueError, match=r"kv_cache=int8 cannot be exported as .* no INT8 ones"):
        check_exportable(caches, all_layers("fp8"), target=target)
    check_exportable(caches, all_layers("fp8"), target="trtllm")


def test_two_scales_do_not_fit_an_engine():
    caches = kv_cache_schemes(all_caches("fp8", "separate"))
    with pytest.raises(ValueError, match="take the larger of two for both"):
        check_exportable(caches, {}, target="trtllm")
    for target in HF:
        check_exportable(caches, all_layers("fp8"), target=target)


@pytest.mark.parametrize("target", HF)
def test_a_cache_alone_is_for_tensorrt_llm(target):
    caches = kv_cache_schemes(all_caches("fp8"))
    with pytest.raises(ValueError, match="without a quantized linear"):
        check_exportable(caches, {}, target=target)
    check_exportable(caches, {}, target="trtllm")
    check_exportable({}, {}, target=target)


def test_what_the_checkpoint_asks_is_refused_before_anything_is_written(tmp_path):
    layers = all_layers("fp8") | all_caches("int8")
    checkpoint = write_checkpoint(tmp_path / "in", TINY, layers)
    with pytest.raises(ValueError, match="cannot be exported as modelopt"):
        export_hf(checkpoint, tmp_path / "out", style="modelopt")
    separate = write_checkpoint(tmp_path / "in2", TINY, all_caches("fp8", "separate"))
    with pytest.raises(ValueError, match="kv_cache_scales=separate"):
        export_trtllm(separate, tmp_path / "out", tensor_parallel=1)
    assert not (tmp_path / "out").exists()


def test_configurations_name_the_cache_as_servers_read_it(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "in", TINY, all_layers("fp8") | all_caches("fp8"))
    export_trtllm(checkpoint, tmp_path / "trtllm", tensor_parallel=1)
    for style in HF:
        export_hf(checkpoint, tmp_path / style, style=style)

    def config(target):
        return json.loads((tmp_path / target / "config.json").read_text())

    found = config("trtllm")["quantization"]
    assert (found["quant_algo"], found["kv_cache_quant_algo"]) == ("FP8", "FP8")
    assert config("compressed-tensors")["quantization_config"]["kv_cache_scheme"] == {
        "num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False,
    }  # fmt: skip
    assert config("modelopt")["quantization_config"]["kv_cache_scheme"] == {
        "dynamic": False, "num_bits": 8, "type": "float",
    }  # fmt: skip
    nested = json.loads((tmp_path / "modelopt" / "hf_quant_config.json").read_text())
    assert nested["quantization"]["kv_cache_quant_algo"] == "FP8"

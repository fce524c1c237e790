"""Which caches a target holds, and what its configuration says."""

import json

import pytest

from mqat.export.export import export_hf, export_trtllm
from mqat.export.exporter import ExportOptions
from mqat.export.exporters import exporter
from tests.unit.export.checkpoints import TINY, all_caches, all_layers, write_checkpoint

HF = ["compressed-tensors", "modelopt"]


def check(schemes, target):
    made = exporter("hf", target) if target in HF else exporter(target)
    made.check(TINY, schemes, ExportOptions())


@pytest.mark.parametrize("target", HF)
def test_int8_caches_have_no_reader_outside_tensorrt_llm(target):
    schemes = all_layers("fp8") | all_caches("int8")
    with pytest.raises(ValueError, match=r"kv_cache=int8 cannot be exported to .* no INT8 ones"):
        check(schemes, target)
    check(schemes, "trtllm")


def test_two_scales_do_not_fit_an_engine():
    schemes = all_layers("fp8") | all_caches("fp8", "separate")
    with pytest.raises(ValueError, match="take the larger of two for both"):
        check(schemes, "trtllm")
    for target in HF:
        check(schemes, target)


@pytest.mark.parametrize("target", HF)
def test_a_cache_alone_is_for_tensorrt_llm(target):
    with pytest.raises(ValueError, match="without a quantized linear"):
        check(all_caches("fp8"), target)
    check(all_caches("fp8"), "trtllm")
    check({}, target)


def test_what_the_checkpoint_asks_is_refused_before_anything_is_written(tmp_path):
    layers = all_layers("fp8") | all_caches("int8")
    checkpoint = write_checkpoint(tmp_path / "in", TINY, layers)
    with pytest.raises(ValueError, match="kv_cache=int8 cannot be exported to ModelOpt style"):
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

"""Norms of query and key heads: exported in every form, verified, and missed when they are wrong."""

from dataclasses import replace

import pytest
from safetensors.torch import load_file, save_file

from mqat.export.export import export_hf, export_trtllm
from mqat.models.structure import KEY_NORM, QUERY_NORM
from mqat.verify.verify import verify_export
from tests.unit.export.checkpoints import TINY, all_layers, write_checkpoint

QWEN3 = replace(TINY, family="qwen3")
FORMS = {
    "trtllm": lambda checkpoint, out: export_trtllm(checkpoint, out, tensor_parallel=2),
    "compressed-tensors": export_hf,
    "modelopt": lambda checkpoint, out: export_hf(checkpoint, out, style="modelopt"),
}


@pytest.mark.parametrize("form", FORMS)
def test_an_export_with_head_norms_is_verified_and_a_swap_of_them_is_named(tmp_path, form):
    checkpoint = write_checkpoint(tmp_path / "checkpoint", QWEN3, all_layers("fp8", QWEN3))
    out = tmp_path / "out"
    FORMS[form](checkpoint, out)
    report = verify_export(out, reference=checkpoint)
    assert report.ok, report.problems
    names = [norm.trtllm if form == "trtllm" else norm.hf for norm in (QUERY_NORM, KEY_NORM)]
    for file in out.glob("*.safetensors"):
        tensors = load_file(file)
        query, key = (next(n for n in tensors if f"s.1.{name}.weight" in n) for name in names)
        tensors[query], tensors[key] = tensors[key].clone(), tensors[query].clone()
        save_file(tensors, file, {"format": "pt"})
    report = verify_export(out, reference=checkpoint)
    assert not report.ok and names[0] in " ".join(report.problems)

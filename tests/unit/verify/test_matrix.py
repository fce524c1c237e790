"""Every format x training layout x inference layout x reader, and why a cell is refused.

`python -m tests.unit.verify.test_matrix` prints the table of the README.
"""

import warnings
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from mqat.export.export import export_hf, export_trtllm
from mqat.verify.verify import verify_export
from tests.unit.export.checkpoints import TINY, all_layers, write_checkpoint
from tests.unit.verify.test_reader import TOKENS, relative, transformers_logits

FORMATS = (
    "null", "int8", "int8_sq", "int8_pc_pt", "int8_wo", "int4", "int4_awq", "w_int4_sym",
    "w_uint4_asym", "int4_w_int8_a", "8da4w", "w4a8_awq", "fp8", "fp8_pc_pt", "nvfp4", "mxfp4",
    "mxfp8", "nf4",
)  # fmt: skip
# How many pieces a training layout left along the first two dimensions of each tensor, unevenly.
TRAINED = {"TP 1": 1, "TP 2": 2, "TP 3": 3}
SERVED = {
    **{f"TensorRT-LLM TP {tp} x PP {pp}": (tp, pp) for tp, pp in ((1, 1), (2, 1), (4, 1), (2, 2))},
    "compressed-tensors": None,
    "ModelOpt style": None,
}
# Relative error of logits, float32: sums over ranks in another order, and codes that flip with them.
# compressed-tensors' own arithmetic divides a token's maximum by 127.5, vLLM's kernels and mqat by 127.
TOLERANCE = {
    "null": 1e-5, "int4": 1e-5, "int8": 5e-3, "fp8": 1e-2, "int8_pc_pt": 0.1,
}  # fmt: skip
# compressed-tensors 0.20 builds the empty model with unpacked zero points and then refuses the file;
# `test_hf.test_zero_points_and_levels_unpack_...` reads it.
# It computes NVFP4 in bfloat16, whose rounding this random model amplifies: compared linear by linear.
NOT_LOADED = ("w_uint4_asym", "nvfp4")
_ENGINES = [target for target in SERVED if "TP" in target]
_NO_ENGINE = ("int4_w_int8_a", "8da4w", "int8_pc_pt", "w_uint4_asym", "mxfp4", "mxfp8", "nf4")
_MODELOPT = (
    "null", "fp8", "fp8_pc_pt", "nvfp4", "int4", "int4_awq", "w_int4_sym", "w4a8_awq",
)  # fmt: skip
REFUSED = {
    **{(name, target): "no such algorithm" for name in _NO_ENGINE for target in _ENGINES},
    ("w4a8_awq", "TensorRT-LLM TP 4 x PP 1"): "groups of 128 do not fit this small model",
    **{(name, "compressed-tensors"): "no such form"
       for name in ("w4a8_awq", "mxfp4", "mxfp8", "nf4")},
    **{(name, "ModelOpt style"): "no server loads it" for name in FORMATS if name not in _MODELOPT},
}  # fmt: skip


_MESSAGES = r"cannot be exported to|multiple of 512"


def export(checkpoint, out, target, **kwargs):
    """Writes one cell's directory in float32."""
    kwargs = {"dtype": "float32", "overwrite": True} | kwargs
    if SERVED[target] is None:
        style = "modelopt" if target == "ModelOpt style" else "compressed-tensors"
        export_hf(checkpoint, out, style=style, **kwargs)
    else:
        tp, pp = SERVED[target]
        export_trtllm(
            checkpoint, out, tensor_parallel=tp, pipeline_parallel=pp,
            allow_requantization=True, **kwargs,
        )  # fmt: skip


def weights(directory: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in sorted(directory.glob("*.safetensors"))}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(format, training layout) -> checkpoint."""
    root = tmp_path_factory.mktemp("matrix")
    return {
        (name, layout): write_checkpoint(root / f"{name}-{cuts}", TINY, all_layers(name), cuts=cuts)
        for name in FORMATS
        for layout, cuts in TRAINED.items()
    }


@pytest.mark.filterwarnings("ignore:W8A16 checkpoints hold unquantized weights")
@pytest.mark.parametrize("target", SERVED)
@pytest.mark.parametrize("name", FORMATS)
def test_cell(name, target, trained, tmp_path):
    if (name, target) in REFUSED:
        for layout in TRAINED:
            with pytest.raises(ValueError, match=_MESSAGES):
                export(trained[name, layout], tmp_path / "out", target)
        return
    written = []
    tp, _ = SERVED[target] or (1, 1)
    expected = transformers_logits(TINY, all_layers(name), TOKENS, tp=tp)
    for layout in TRAINED:
        checkpoint, out = trained[name, layout], tmp_path / layout
        export(checkpoint, out, target)
        written.append(weights(out))
        # Readers 1 and 2: bit-for-bit comparison with the checkpoint, and the rank-by-rank decoder.
        report = verify_export(
            out, reference=checkpoint, tokens=TOKENS,
            reference_logits=None if name == "int8_wo" else expected,  # rounded again by loaders
        )  # fmt: skip
        assert report.problems == [], layout
    assert written[0] == written[1] == written[2]
    if target == "compressed-tensors" and _has_compressed_tensors():  # reader 3
        if name in NOT_LOADED:
            return
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "TP 1", dtype=torch.float32)
        with torch.no_grad():
            assert relative(model(TOKENS).logits, expected) < TOLERANCE.get(name, 5e-3)


def _has_compressed_tensors() -> bool:
    try:
        import compressed_tensors  # noqa: F401
    except ImportError:
        return False
    return True


def test_int8_wo_needs_consent_for_tensorrt_llm(trained, tmp_path):
    with pytest.raises(ValueError, match="allow_requantization"):
        export_trtllm(trained["int8_wo", "TP 1"], tmp_path / "out", tensor_parallel=1)


def table() -> str:
    """The matrix as markdown."""

    def cell(name, target):
        if (name, target) in REFUSED:
            return f"refused: {REFUSED[name, target]}"
        if name == "int8_wo" and "TP" in target:
            return "with consent: the loader rounds again"
        if name == "fp8_pc_pt" and target in _ENGINES[1:]:
            return "yes; ranks round tokens by their own channels"
        is_loaded = target == "compressed-tensors" and name not in NOT_LOADED
        return "yes, and transformers" if is_loaded else "yes"

    lines = ["| format | " + " | ".join(SERVED) + " |", "|---" * (len(SERVED) + 1) + "|"]
    lines += [
        f"| `{name}` | " + " | ".join(cell(name, target) for target in SERVED) + " |"
        for name in FORMATS
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    print(table())

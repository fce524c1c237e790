"""What TensorRT-LLM engines serve: for each combination of operands the algorithm and its tensors.

Facts of the format (TensorRT-LLM 0.17 to 1.2): `models/modeling_utils.py` and
`quantization/{quantize,layers}.py` of NVIDIA/TensorRT-LLM. Scaling factors multiply when
dequantizing. SmoothQuant and AWQ are folded into weights and norms. Experts: `layers/moe.py`.
"""

from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

import torch

from mqat.export import operands
from mqat.export import tensor_builders as build
from mqat.export.decoder_tensors import DecoderTensors, Naming
from mqat.export.forms import Form, Forms
from mqat.export.kv_cache import CacheForm
from mqat.export.operands import group_size, is_integer
from mqat.models.structure import TRTLLM_LAYER, Linear
from mqat.quant.formats import FP8_E4M3, INT8_MIN128, NF4
from mqat.quant.scheme import LinearScheme


@dataclass(frozen=True)
class TrtllmForm(Form):
    """A form, whose name is a `quant_algo`.

    Attributes:
        group_sizes: That its group-wise INT4 kernels take; with them come size rules and options.
        is_requantized: The loader quantizes again; the served weights are not the trained ones.
        takes_experts: Its mixtures have kernels for it, and its loader reads stacked tensors of it.
    """

    group_sizes: tuple[int, ...] = ()
    is_requantized: bool = False
    takes_experts: bool = False

    def options(self, scheme: LinearScheme) -> dict[str, Any]:
        """The `quantization` entries of a linear, as in a config for a whole model of such linears."""
        awq = {"has_zero_point": False, "pre_quant_scale": True} if self.group_sizes else {}
        size = {"group_size": group_size(scheme)} if self.group_sizes else {}
        return {"quant_algo": self.name} | size | awq


_SCALED_CODES = {"weight": build.codes, "weights_scaling_factor": build.frozen_scale}
_INPUT = {"activation_scaling_factor": build.input_scale}
_INT4 = {
    "weight": build.row_pairs,
    "weights_scaling_factor": build.model_scale,
    "prequant_scaling_factor": build.ones,
}
_NVFP4 = {
    "weight": build.column_pairs,
    "weights_scaling_factor": build.e4m3_scale,
    "weights_scaling_factor_2": build.global_scale,
    "activation_scaling_factor": build.input_global_scale,
}
_PER_CHANNEL = {"weight": build.codes, "per_channel_scale": build.frozen_scale}
# Its graph casts these steps to the dtype of the model before it multiplies, where no plugin does: only
# numbers of bfloat16 stay what was trained.
_FP8 = replace(operands.FP8_TENSOR, scale_dtypes=(operands.BF16,))

FORMS = Forms(
    "TensorRT-LLM",
    (
        TrtllmForm(
            "W8A8_SQ_PER_CHANNEL", operands.INT8_CHANNELS, operands.INT8_TENSOR,
            _SCALED_CODES | _INPUT | {"prequant_scaling_factor": build.ones},
        ),
        TrtllmForm(
            "FP8", _FP8, _FP8,
            {
                "weight": build.codes,
                "weights_scaling_factor": build.cast_scale,
                "activation_scaling_factor": build.cast_input_scale,
            },
            takes_experts=True,
        ),
        TrtllmForm(
            "FP8_PER_CHANNEL_PER_TOKEN", operands.FP8_CHANNELS, operands.FP8_TOKENS, _PER_CHANNEL
        ),
        TrtllmForm(
            "W4A16_AWQ", operands.INT4_GROUPS, None, _INT4, group_sizes=(64, 128), takes_experts=True
        ),
        TrtllmForm(
            "W4A8_AWQ", operands.INT4_GROUPS, _FP8,
            _INT4 | {"weights_scaling_factor_2": build.fp8_range_scale} | _INPUT, group_sizes=(128,),
        ),
        TrtllmForm("NVFP4", operands.NVFP4, operands.NVFP4_INPUT, _NVFP4),
        TrtllmForm(
            "W8A16", operands.INT8_CHANNELS, None, {"weight": build.dequantized}, is_requantized=True
        ),
    ),
    (
        (
            lambda weight, x: is_integer(weight) and weight.format.bits == 4 and is_integer(x),
            "TensorRT-LLM has no INT4 weights with INT8 activations: use int8 (W8A8), w4a8_awq (FP8 "
            "activations) or int4 (weight-only), or export.format=hf.",
        ),
        (
            lambda weight, x: is_integer(weight) and is_integer(x),
            "INT8 activations per token are only in plugins that replace whole layers: use int8_sq "
            "(static), fp8_pc_pt, or export.format=hf.",
        ),
        (
            lambda weight, x: weight.is_asymmetric,
            "AWQ kernels are used without zero points here: use w_int4_sym or int4_awq, or "
            "export.format=hf.",
        ),
        (
            lambda weight, x: weight.format == NF4 or weight.scale_name == "float8_e8m0fnu",
            "Engines have no MX formats and no NF4: use nvfp4, fp8, fp8_pc_pt or int4_awq.",
        ),
        (
            lambda weight, x: x is None,
            "The only exact weight-only form is INT4 groups: quantize the input as well, leave the "
            "weight unquantized too, or use export.format=hf.",
        ),
    ),
)  # fmt: skip

NAMING = Naming(
    lambda _: TRTLLM_LAYER,
    attrgetter("trtllm"),
    Linear.trtllm_modules,
    writes_tied_head=True,
    adds_one=True,
    transposes=False,
    router_dtype=torch.float32,
    stacks_experts=True,
    of_all_experts=("prequant_scaling_factor", "activation_scaling_factor"),
)
CACHE = CacheForm(
    lambda cache: {f"{cache.trtllm}.kv_cache_scaling_factor": "kv"},
    (1,),
    (INT8_MIN128, FP8_E4M3),
    is_beside_linears=False,
)
TENSORS = DecoderTensors(NAMING, FORMS, CACHE)

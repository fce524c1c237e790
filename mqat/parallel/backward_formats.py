"""Which schemes can have gradients in 8 bits; decided before a process group exists."""

from collections.abc import Mapping

from mqat.errors import UserError
from mqat.parallel.step_weights import GemmKind, gemm_kind
from mqat.quant.formats import FP8_E4M3, INT8
from mqat.quant.scheme import LinearScheme

FORMATS = {"int8": INT8, "fp8": FP8_E4M3}
BACKWARDS = ("bf16", *FORMATS)
_EXAMPLES = {"int8": "int8 or int8_pc_pt", "fp8": "fp8 or fp8_pc_pt"}


def check_backward(backward: str, schemes: Mapping[str, LinearScheme]) -> None:
    """Refuses 8-bit gradients where a quantized linear has no operands of that format.

    Args:
        backward: `bf16` (exact), `int8` or `fp8`.
        schemes: Global name -> scheme of every quantized linear.

    Raises:
        UserError: Names the linear and what its operands are.
    """
    if backward not in BACKWARDS:
        raise UserError(f"backward={backward!r} is not one of: {', '.join(BACKWARDS)}.")
    if backward == "bf16":
        return
    if not schemes:
        raise UserError(f"backward={backward}, but no linear is quantized; set it to bf16.")
    for name, scheme in schemes.items():
        weight, is_float = scheme.weight, FORMATS[backward].is_float
        is_codes = gemm_kind(scheme) is GemmKind.CODES
        if is_codes and weight is not None and weight.format.is_float == is_float:
            continue
        found = {kind: operand.format.name for kind, operand in scheme.operands.items()}
        raise UserError(
            f"backward={backward}: {name} has {found or 'no quantized operands'}. Gradients in "
            f"{backward} multiply codes of weight and input, both {backward}, with weight scales per "
            "tensor or channel and symmetric inputs per tensor or token. Set it to bf16, or use for all "
            f"linears an algorithm such as {_EXAMPLES[backward]}."
        )

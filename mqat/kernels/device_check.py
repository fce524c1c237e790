"""Fixed inputs through every operator that promises the same bits on every device, and their SHA-256.

A GPU's digests are compared with a CPU's (`tests/gpu`, `tools/bench_gpu.py`). Left out is what only
promises a tolerance: norms, SwiGLU, and products of float8, whose sums depend on their order.
`scale_product` is what integer GEMMs end in.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from mqat.kernels import operators
from mqat.quant.formats import FP4_E2M1, FP8_E4M3, INT4, INT8, INT8_MIN128
from mqat.quant.granularity import Granularity, PerChannel, PerGroup, PerTensor

_FORMATS = (INT8, INT8_MIN128, INT4, FP8_E4M3)
_ROUNDED_STOCHASTICALLY = (INT8, FP8_E4M3)
_GRANULARITIES = (PerTensor(), PerChannel(), PerGroup(64))
_ROWS, _WIDTH = 96, 256


def _normal(rows: int, width: int, seed: int) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def _adversarial(dtype: torch.dtype) -> Tensor:
    """Normal numbers, ties, subnormal E4M3 numbers, both zeros and both infinities."""
    x = _normal(_ROWS, _WIDTH, 0) * 3
    x[0] = torch.linspace(-1, 1, _WIDTH) * 0.01
    x[1] = torch.arange(_WIDTH) * 0.5 - _WIDTH / 4
    x[2, :4] = torch.tensor([torch.inf, -torch.inf, -0.0, 0.0])
    return x.to(dtype)


def _scale(granularity: Granularity) -> Tensor:
    shape = granularity.scale_shape((_ROWS, _WIDTH))
    return (_normal(1, int(torch.Size(shape).numel()), 1).abs() * 0.05 + 0.5**6).view(shape)


def fixed_results(device: torch.device) -> dict[str, list[Tensor]]:
    """What the operators make of the fixed inputs on `device`, by call, on the CPU."""
    found: dict[str, list[Tensor]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        x = _adversarial(dtype).to(device)
        name = str(dtype).removeprefix("torch.")
        for fmt in _FORMATS:
            for granularity in _GRANULARITIES:
                call = f"{fmt.name} {granularity} {name}"
                scale = _scale(granularity).to(device)
                encoded = operators.encode(x, scale, fmt, granularity, with_mask=True)
                assert encoded.mask is not None, "asked for"
                values = operators.decode(
                    encoded.codes, dtype, scale=scale, granularity=granularity
                )
                found[f"encode {call}"] = [encoded.codes, encoded.scale, encoded.mask]
                found[f"decode {call}"] = [values]
        for granularity in _GRANULARITIES:
            scale = _scale(granularity).to(device)
            for fmt in (*_FORMATS, FP4_E2M1):
                values, mask = operators.fake_quantize_with_mask(
                    x, scale, fmt, granularity, ste_clip_range=None
                )
                assert mask is not None, "asked for"
                found[f"fake_quantize {fmt.name} {granularity} {name}"] = [values, mask]
            zero = torch.full(scale.shape, 3, dtype=torch.int32, device=device)
            shifted = operators.encode(
                x, scale, INT8_MIN128, granularity, with_mask=False, zero_point=zero
            )
            values = operators.decode(
                shifted.codes, dtype, scale=scale, granularity=granularity, zero_point=zero
            )
            found[f"encode asymmetric {granularity} {name}"] = [shifted.codes, shifted.scale]
            found[f"decode asymmetric {granularity} {name}"] = [values]
        finite = x.nan_to_num(0.0, 1.0, -1.0)
        column = torch.arange(_WIDTH, dtype=torch.int32, device=device) + 7
        for fmt in _ROUNDED_STOCHASTICALLY:
            for rounded in (operators.stochastic_rows, operators.stochastic_columns):
                by_row = rounded is operators.stochastic_rows
                factors = _normal(1, _WIDTH if by_row else _ROWS, 2).abs().flatten().to(device)
                call = f"stochastic_{'rows' if by_row else 'columns'} {fmt.name} {name}"
                found[call] = list(rounded(finite, factors, column, fmt.name, 2026))
        step = torch.tensor([0.02], device=device)
        mask = operators.encode(finite, step, INT4, PerTensor(), with_mask=True).mask
        masked, total = finite.clone(), torch.ones_like(finite, dtype=torch.float32)
        operators.apply_mask_(masked, mask, step)
        operators.accumulate_(total, finite, mask, step)
        found[f"apply_mask {name}"], found[f"accumulate {name}"] = [masked], [total]
        a = operators.encode(finite, step, INT8_MIN128, PerTensor(), with_mask=False).codes
        rows, columns = _scale(PerChannel()).to(device), step.expand(_ROWS).contiguous()
        found[f"int8 GEMM, tensor {name}"] = [operators.scaled_matmul(a, a, step, dtype)]
        found[f"int8 GEMM, channel {name}"] = [operators.scaled_matmul(a, a, rows, dtype)]
        found[f"int8 GEMM, token {name}"] = [
            operators.scaled_matmul(a, a, rows, dtype, row_scale=columns)
        ]
    return {call: [x.cpu() for x in tensors] for call, tensors in found.items()}


def digests(device: torch.device) -> dict[str, str]:
    """SHA-256 of the bits of `fixed_results`, by call; of NaN only that it is one."""
    found = {}
    for call, tensors in fixed_results(device).items():
        sha = hashlib.sha256()
        for x in tensors:
            plain = (
                x
                if x.dtype in (torch.int8, torch.uint8, torch.float8_e4m3fn)
                else x.nan_to_num(7.25)
            )
            sha.update(plain.contiguous().view(torch.uint8).numpy().tobytes())
        found[call] = sha.hexdigest()
    return found

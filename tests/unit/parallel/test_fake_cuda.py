"""Quantized linears on fake CUDA tensors: devices, host waits, and the bytes that their passes move.

A linear 4096 -> 4096 of 8192 tokens in BF16, two microbatches of a step, weight gradients added to a
`main_grad` as Megatron's DDP has it. Bytes are counted beside the GEMMs and beyond what an unquantized
linear moves there (its weight gradient's way into `main_grad`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from mqat.parallel import quantized_gemm
from mqat.parallel.activated_linear import ActivatedRowParallelLinear
from mqat.parallel.low_precision_backward import set_backward_
from mqat.parallel.quantized_step import quantized_step
from mqat.plan.step_model import Kernel, linear_kernels
from mqat.quant.algorithm import ALGORITHMS, named_scheme
from tests.unit.fake_cuda import (
    CUDA,
    HostWaitsError,
    Ledger,
    Pass,
    backward,
    fake_cuda,
    install_guard,
    to_fake_cuda_,
)

TOKENS, SIZE = 8192, 4096
MB = 1e6

# MB a step with one microbatch, 136 of them the mask of `main_grad`. Without the operators' backend on
# CUDA: int8 5.7 GB, fp8 5.4.
BUDGET = {
    "int8": 590, "int8_sq": 590, "int8_pc_pt": 515, "int8_wo": 210,
    "fp8": 590, "fp8_pc_pt": 515,
    "nvfp4": 520, "mxfp4": 525, "mxfp8": 520, "nf4": 1900,
    "int4": 210, "int4_awq": 210, "w_int4_sym": 210, "w_uint4_asym": 1800,
    "w4a8_awq": 660, "int4_w_int8_a": 660, "8da4w": 650,
    "null": 0,
}  # fmt: skip
# With gradients in 8 bits, which both GEMMs read as codes.
BUDGET_8_BIT = {"int8": 740, "int8_pc_pt": 665, "fp8": 740, "fp8_pc_pt": 665}
# With the SwiGLU in front, beyond what an unquantized linear and its SwiGLU move (537 in 8192 x 4096).
BUDGET_ACTIVATED = {
    "int8": 320,
    "fp8": 320,
    "w4a8_awq": 390,
    "int4_w_int8_a": 390,
    "int8_pc_pt": 515,
}


@pytest.fixture(autouse=True)
def _cuda(tmp_path_factory, world, monkeypatch):
    install_guard(tmp_path_factory.getbasetemp())
    # Outside autograd's engine nothing else says that gradients end in `.grad`.
    monkeypatch.setattr(quantized_gemm, "accumulates", lambda node: True)
    monkeypatch.setattr(torch.autograd, "grad", grad)  # which would start the engine


@dataclass(frozen=True)
class Traced:
    """Kernels of a linear: once per step, and per microbatch."""

    once: Sequence[Pass]
    forward: Sequence[Pass]
    backward: Sequence[Pass]

    @property
    def extra_bytes(self) -> int:
        return passes_bytes([*self.once, *self.forward, *self.backward])


def passes_bytes(passes: Sequence[Pass]) -> int:
    return sum(p.num_bytes for p in passes if not p.is_gemm)


def make_linear(algorithm: str, kind: str = "Column", **layout):
    """`kind`: a class's name without what all of them share; an activated one has SwiGLU inside."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    from mqat.parallel import activated_linear, linear
    from mqat.specs.elementwise import Swiglu

    config = TransformerConfig(
        num_layers=1, hidden_size=SIZE, num_attention_heads=32, perform_initialization=False,
        use_cpu_initialization=True, params_dtype=torch.bfloat16, bf16=True,
        gated_linear_unit=True, activation_func=F.silu, use_te_activation_func=True, **layout,
    )  # fmt: skip
    own = {"gather_output": False} if kind == "Column" else {"input_is_parallel": True}
    made = getattr(linear, f"Quant{kind}ParallelLinear", None)
    if kind == "ActivatedRow":
        made, own["activation"] = activated_linear.ActivatedRowParallelLinear, Swiglu
    return made(
        SIZE, SIZE, config=config, init_method=lambda w: None, bias=False, skip_bias_add=True,
        quantized_name="fc", scheme=named_scheme(algorithm),
        num_shards=layout.get("tensor_model_parallel_size", 1), **own,
    )  # fmt: skip


def run_step(
    linear, ledger: Ledger, rows: int = TOKENS, features: int = SIZE, gradients_in: str = "bf16"
) -> Traced:
    """The second step of a linear on fake CUDA tensors: two microbatches."""
    with fake_cuda():
        to_fake_cuda_(linear)
        for quantizer in linear.quantizers.values():
            quantizer.is_frozen = True
        set_backward_([linear], gradients_in)
        linear.weight.main_grad = torch.empty(linear.weight.shape, device=CUDA)
        linear.weight.grad_added_to_main_grad = False
        x = torch.empty(rows, 1, features, dtype=torch.bfloat16, device=CUDA, requires_grad=True)
        with ledger:
            for _ in range(2):
                marks = [len(ledger.passes)]
                with quantized_step([linear]):
                    for _ in range(2):
                        y, _ = linear(x)
                        marks.append(len(ledger.passes))
                        gradients = backward(y, torch.empty_like(y))
                        assert gradients[x].device == CUDA and gradients[x].shape == x.shape
                        if not linear.weight.grad_added_to_main_grad:  # as DDP's hook
                            linear.weight.main_grad.add_(gradients[linear.weight])
                        marks.append(len(ledger.passes))
                marks.append(len(ledger.passes))
    first, after_first, second, end, closed = (ledger.passes[a:b] for a, b in pairwise(marks))
    once = [*_less(first, second), *_less(after_first, end), *closed]
    return Traced(once, second, end)


def grad(output: torch.Tensor, leaf: torch.Tensor, upstream: torch.Tensor):
    return (backward(output, upstream)[leaf],)


def _less(first: Sequence[Pass], again: Sequence[Pass]) -> list[Pass]:
    left = list(first)
    for each in again:
        left.remove(each)
    return left


def traced(
    algorithm: str, gradients_in: str = "bf16", *, is_activated: bool = False, **ledger
) -> Traced:
    linear = make_linear(algorithm, "ActivatedRow" if is_activated else "Column")
    features = 2 * SIZE if is_activated else SIZE
    return run_step(linear, Ledger(**ledger), features=features, gradients_in=gradients_in)


def table(found: dict[str, Traced]) -> str:
    def cell(passes: Sequence[Pass]) -> str:
        beside = [p for p in passes if not p.is_gemm]
        return f"{len(beside):3} /{passes_bytes(beside) / MB:6.0f}"

    return "\n".join(
        f"{name:14} {cell(t.once)} {cell(t.forward)} {cell(t.backward)}"
        for name, t in found.items()
    )


@pytest.fixture
def unquantized() -> Traced:
    return traced("null")


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_passes_beside_the_gemms_keep_to_their_budget_and_to_the_model(algorithm, unquantized):
    check(algorithm, "bf16", BUDGET[algorithm], unquantized)


@pytest.mark.parametrize("algorithm", BUDGET_8_BIT)
def test_so_do_those_of_gradients_in_8_bits(algorithm, unquantized):
    backward = algorithm.partition("_")[0]
    check(algorithm, backward, BUDGET_8_BIT[algorithm], unquantized)


@pytest.mark.parametrize("algorithm", BUDGET_ACTIVATED)
def test_so_do_those_with_swiglu_inside_where_its_values_are_not_needed(algorithm):
    unquantized = traced("null", is_activated=True)
    check(algorithm, "bf16", BUDGET_ACTIVATED[algorithm], unquantized, is_activated=True)
    if algorithm in BUDGET_8_BIT:
        backward = algorithm.partition("_")[0]
        budget = BUDGET_8_BIT[algorithm] - BUDGET[algorithm] + BUDGET_ACTIVATED[algorithm]
        check(algorithm, backward, budget, unquantized, is_activated=True)


def test_swiglu_in_front_of_the_linear_exceeds_that_budget(monkeypatch):
    """Control: its values are written, read again, and their gradient is masked in a pass of its own."""
    unquantized = traced("null", is_activated=True)
    monkeypatch.setattr(ActivatedRowParallelLinear, "_fuses", lambda self: False)
    extra = traced("int8", is_activated=True).extra_bytes - unquantized.extra_bytes
    assert extra > (BUDGET_ACTIVATED["int8"] + 250) * MB


def check(
    algorithm: str,
    backward: str,
    budget: float,
    unquantized: Traced,
    *,
    is_activated: bool = False,
) -> None:
    found = traced(algorithm, backward, is_activated=is_activated)
    extra = (found.extra_bytes - unquantized.extra_bytes) / MB
    assert extra <= budget, table({algorithm: found})
    model = linear_kernels(
        named_scheme(algorithm), TOKENS, SIZE, SIZE, backward=backward, is_activated=is_activated
    )
    for part in ("once", "forward", "backward"):
        passes: Sequence[Pass] = getattr(found, part)
        kernels: Sequence[Kernel] = getattr(model, part)
        few = max(3, len(kernels) // 4)  # kernels on scales
        assert len(passes) == pytest.approx(len(kernels), abs=few), (part, passes)
        assert sum(p.flops for p in passes) == sum(k.flops for k in kernels)
        expected = sum(k.num_bytes for k in kernels)
        assert sum(p.num_bytes for p in passes) == pytest.approx(expected, rel=0.02), (part, passes)


@pytest.mark.parametrize("algorithm", ["int8", "fp8"])
def test_int8_and_fp8_move_little_more_than_their_gemms_in_bf16(algorithm, unquantized):
    gemms, extra = (
        sum(p.num_bytes for p in (*unquantized.forward, *unquantized.backward) if p.is_gemm),
        traced(algorithm).extra_bytes - unquantized.extra_bytes,
    )
    assert gemms == 3 * 2 * (2 * TOKENS * SIZE + SIZE * SIZE)  # control: BF16 reads and writes
    assert 0 < extra <= 1.2 * gemms


@pytest.mark.parametrize("algorithm", ["int8", "fp8", "int4"])
def test_without_one_kernel_a_pass_the_budget_is_exceeded(algorithm, unquantized):
    found = traced(algorithm, decomposed=True)
    assert found.extra_bytes - unquantized.extra_bytes > 5 * BUDGET[algorithm] * MB


def test_a_wasteful_pass_exceeds_the_budget(monkeypatch, unquantized):
    """Control: the output gradient times a scale, in float32."""
    gradient = quantized_gemm.input_gradient

    def wasteful(dy, used, dtype, *args):
        return gradient((dy * used.scale).to(dy.dtype), used, dtype, *args)

    monkeypatch.setattr(quantized_gemm, "input_gradient", wasteful)
    assert traced("int8").extra_bytes - unquantized.extra_bytes > BUDGET["int8"] * MB


def _moves_a_cpu_tensor(x):
    return x * torch.ones(8)


def _reads_a_number(x):
    return x * x.amax().item()


def _makes_a_tensor_of_numbers(x):
    return x * torch.tensor([1.0] * 8, device=CUDA)


def _counts(x):
    return x[x > 0]


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (_moves_a_cpu_tensor, "two devices"),
        (_reads_a_number, "_local_scalar_dense"),
        (_makes_a_tensor_of_numbers, "cpu -> cuda:0"),
        (_counts, "nonzero"),
    ],
)
def test_mixed_devices_and_host_waits_are_noticed(wrong: Callable, says):
    with fake_cuda(Ledger()), pytest.raises((RuntimeError, HostWaitsError), match=says):
        wrong(torch.empty(8, device=CUDA))

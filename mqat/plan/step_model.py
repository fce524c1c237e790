"""What a QAT step costs on a GPU beside a BF16 one, by counting: kernels, their bytes, their FLOPs.

A model, not a measurement: each kernel takes the longest of its launch, its memory traffic and its
arithmetic, and kernels do not overlap. Communication is left out: it is the same or less (codes travel
instead of floats). `tests/unit/parallel/test_fake_cuda.py` traces the real code with fake CUDA tensors
and compares its kernels and bytes with `linear_kernels`, so this file is also the linears' byte budget.

Suffixes: N tokens of a microbatch, I input features, O output features, all of one rank.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from mqat.models.schemes import linear_schemes
from mqat.models.structure import in_layer
from mqat.parallel.activated_linear import fuses_activation
from mqat.parallel.step_weights import GemmKind, encodes_input, gemm_kind
from mqat.plan.run import RunPlan
from mqat.quant.formats import FP4_E2M1
from mqat.quant.granularity import PerBlock, PerGroup
from mqat.quant.scheme import LinearScheme, TensorScheme


@dataclass(frozen=True)
class Card:
    """What a GPU achieves, not what its data sheet says.

    Attributes:
        name: For people.
        bytes_per_second: Of a streaming kernel.
        bf16_flops: Of large BF16 GEMMs, per second.
        eight_bit_flops: Of large INT8 or FP8 GEMMs, per second.
        launch_seconds: Shortest time from one small kernel to the next.
    """

    name: str
    bytes_per_second: float
    bf16_flops: float
    eight_bit_flops: float
    launch_seconds: float


# Of 3.35 TB/s, 989 TFLOP/s and 1979 TOP/s on the data sheet: what large kernels usually reach.
H100 = Card("H100", 2.8e12, 650e12, 1150e12, 3e-6)
# Share of a BF16 step that linears of the layers take at hidden 4096; the rest (attention, norms,
# vocabulary, optimizer) is the same in QAT.
LINEAR_SHARE = 0.78

# Bytes that a pass reads and writes per element: BF16 values are 2, codes 1, bits of a mask 1/8.
_VALUE, _CODE, _BIT, _GRAD_SUM = 2.0, 1.0, 0.125, 4.0
_ENCODE = _VALUE + _CODE
_DECODE = _CODE + _VALUE
_FAKE_QUANTIZE = 2 * _VALUE
_MASK_IN_PLACE = 2 * _VALUE + _BIT
_ADD_TO_MAIN_GRAD = _VALUE + 2 * _GRAD_SUM
_MASK_MAIN_GRAD = 2 * _GRAD_SUM + _BIT
_TRANSPOSE = 2 * _CODE
# Of SwiGLU, per element of its result.
_SWIGLU, _SWIGLU_BACKWARD = 3 * _VALUE, 5 * _VALUE
# Maxima of dynamic scales by torch's own reductions, of ranges both ends, and their launches: the
# reductions, and what makes scales of them.
_MAXIMA, _RANGES = (_VALUE, 9), (2 * _VALUE, 16)
# Maxima of a block and what makes scales of them: bytes per element, bytes per block, launches; by
# grid of the scales, any other one as E8M0.
_BLOCK_MAXIMA = {torch.float32: (2.0, 42.0, 8), torch.float8_e4m3fn: (2.0, 42.0, 8)}
_COARSE_BLOCK_MAXIMA = (2.0, 88.0, 13)
_ROUNDED_EXPONENT = (8.0, 1)  # where they are not rounded down: bytes per block, launches
_BLOCK_RANGES = (4.0, 182.0, 16)
# Quantized values and their mask where no kernel of its own makes them: torch's operations one by one,
# most of them on float32. Bytes per element and launches, as traced with fake CUDA tensors.
_UNFUSED_INTEGERS = (84.1, 14)  # in blocks of rows, or groups that are not whole bytes of mask
_UNFUSED_LEVELS = (102.3, 23)  # nearest of a table: NF4
_UNFUSED_SHIFTED_WEIGHT = (96.7, 23)  # zero points; autograd makes the mask, which is packed
# Zero points of inputs. Only a static scale clips: a mask of one byte, and a pass over the gradient.
_UNFUSED_SHIFTED_INPUT = {"static": (77.0, 16), "dynamic": (52.0, 14)}
_MASK_BY_BYTES = 2 * _VALUE + _CODE


@dataclass(frozen=True)
class Kernel:
    """One launch: memory traffic in bytes, and for GEMMs the arithmetic."""

    num_bytes: float
    flops: float = 0.0
    is_eight_bit: bool = False

    def seconds(self, card: Card) -> float:
        """Under the roofline, and no shorter than a launch."""
        rate = card.eight_bit_flops if self.is_eight_bit else card.bf16_flops
        return max(card.launch_seconds, self.num_bytes / card.bytes_per_second, self.flops / rate)


Kernels = tuple[Kernel, ...]


def seconds(kernels: Iterable[Kernel], card: Card) -> float:
    """One after another."""
    return sum(kernel.seconds(card) for kernel in kernels)


@dataclass(frozen=True)
class LinearKernels:
    """What one linear launches.

    Attributes:
        once: Per optimizer step: the weight, and the mask of the sum of its gradients.
        forward: Per microbatch.
        backward: Per microbatch, the weight gradient's way into `main_grad` included.
        activation: Those among both that are SwiGLU's alone.
    """

    once: Kernels
    forward: Kernels
    backward: Kernels
    activation: Kernels = ()

    def step_seconds(self, microbatches: int, card: Card) -> float:
        """Of one optimizer step."""
        each = seconds(self.forward, card) + seconds(self.backward, card)
        return seconds(self.once, card) + microbatches * each


def _small(count: int) -> Kernels:
    """Kernels on scales: nothing but their launch."""
    return (Kernel(0.0),) * count


def _split(num_bytes: float, launches: int) -> Kernels:
    return (Kernel(num_bytes / launches),) * launches


def _maxima(operand: TensorScheme, elements: int) -> Kernels:
    """What makes dynamic scales."""
    if not operand.is_dynamic:
        return ()
    if isinstance(operand.granularity, PerGroup):
        coarse = _BLOCK_MAXIMA.get(operand.scale_dtype, _COARSE_BLOCK_MAXIMA)
        each, a_block, launches = _BLOCK_RANGES if operand.is_asymmetric else coarse
        if operand.exponent != "floor":
            a_block, launches = a_block + _ROUNDED_EXPONENT[0], launches + _ROUNDED_EXPONENT[1]
        return _split((each + a_block / operand.granularity.size) * elements, launches)
    per_element, launches = _RANGES if operand.is_asymmetric else _MAXIMA
    passes = 2 if operand.is_asymmetric else 1
    return _split(per_element * elements, passes) + _small(launches - passes)


def _unfused(operand: TensorScheme, *, is_weight: bool) -> tuple[float, int] | None:
    """Bytes per element and launches of quantized values and their mask; None: one kernel."""
    granularity = operand.granularity
    if operand.is_asymmetric:
        kind = "dynamic" if operand.is_dynamic else "static"
        return _UNFUSED_SHIFTED_WEIGHT if is_weight else _UNFUSED_SHIFTED_INPUT[kind]
    if operand.format.levels and operand.format != FP4_E2M1:
        return _UNFUSED_LEVELS
    is_ragged = isinstance(granularity, PerGroup) and granularity.size % 8 != 0
    return _UNFUSED_INTEGERS if is_ragged or isinstance(granularity, PerBlock) else None


def _values(operand: TensorScheme, elements: int, *, is_weight: bool) -> Kernels:
    """Quantized values in BF16, and their mask."""
    unfused = _unfused(operand, is_weight=is_weight)
    if unfused is not None:
        return _split(unfused[0] * elements, unfused[1])
    groups = 4 / operand.granularity.size if isinstance(operand.granularity, PerGroup) else 0.0
    return (Kernel((_FAKE_QUANTIZE + _BIT + groups) * elements),)


@dataclass(frozen=True)
class _InputKernels:
    """Of an input: before the forward GEMM, before the weight gradient's, on the input's gradient."""

    forward: Kernels = ()
    decoded: Kernels = ()
    masked: Kernels = ()


def _input_kernels(
    operand: TensorScheme | None, x: int, own: int, *, is_codes: bool, fuses: bool
) -> _InputKernels:
    """`x` elements, of which this rank quantizes `own`.

    `is_codes`: codes are multiplied; `fuses`: they come out of SwiGLU, which is counted here.
    """
    if operand is None:
        return _InputKernels()
    clips = not operand.is_dynamic
    maxima, mask = _maxima(operand, own), (Kernel(_MASK_IN_PLACE * own),) * clips
    if not encodes_input(operand):
        if operand.is_asymmetric:
            mask = (Kernel(_MASK_BY_BYTES * own),) * clips
        return _InputKernels((*maxima, *_values(operand, own, is_weight=False)), (), mask)
    decoded = (Kernel(_DECODE * x),)
    after = _small(1) * clips if is_codes else decoded
    encoded = Kernel((_ENCODE + _BIT * clips + _VALUE * fuses) * own)
    if fuses:
        mask = (Kernel((_SWIGLU_BACKWARD + _BIT) * own),)
    return _InputKernels((*maxima, encoded, *after), decoded, mask)


def linear_kernels(
    scheme: LinearScheme | None,
    tokens: int,
    outputs: int,
    inputs: int,
    *,
    backward: str = "bf16",
    sequence_shards: int = 1,
    is_activated: bool = False,
) -> LinearKernels:
    """Kernels of one linear on one rank, on CUDA with Triton, parameters and activations in BF16.

    Args:
        scheme: None: unquantized.
        tokens: Of a microbatch, that this rank multiplies.
        outputs: Output features of this rank.
        inputs: Input features of this rank.
        backward: `bf16`, or `fp8` or `int8`: both gradients by GEMMs of 8 bits, for which the output
            gradient is quantized twice, along either of its dimensions.
        sequence_shards: The input is quantized and its gradient masked in that many parts, one a rank.
        is_activated: Count the SwiGLU in front of it, too, which may be fused with encoding the input.
    """
    operand = scheme.input if scheme is not None and gemm_kind(scheme) is not None else None
    fuses = is_activated and fuses_activation(operand)
    found = _linear_kernels(
        scheme, tokens, outputs, inputs, backward=backward, sequence_shards=sequence_shards, fuses=fuses
    )  # fmt: skip
    if fuses or not is_activated:
        return found
    x = tokens * inputs
    activation = Kernel(_SWIGLU * x), Kernel(_SWIGLU_BACKWARD * x)
    forward = (activation[0], *found.forward)
    return LinearKernels(found.once, forward, (*found.backward, activation[1]), activation)


def _linear_kernels(
    scheme: LinearScheme | None,
    tokens: int,
    outputs: int,
    inputs: int,
    *,
    backward: str,
    sequence_shards: int,
    fuses: bool,
) -> LinearKernels:
    x, w, y = tokens * inputs, outputs * inputs, tokens * outputs
    flops = 2.0 * tokens * outputs * inputs
    gemm = Kernel(_VALUE * (x + w + y), flops)
    add = Kernel(_ADD_TO_MAIN_GRAD * w)
    kind = gemm_kind(scheme)
    if scheme is None or scheme.weight is None or kind is None:
        return LinearKernels((), (gemm,), (gemm, gemm, add))
    is_codes = kind is GemmKind.CODES
    eight_bit = Kernel(_CODE * (x + w) + _VALUE * y, flops, is_eight_bit=True)
    encoded = (Kernel((_ENCODE + _BIT) * w),)
    quantized = encoded if is_codes else _values(scheme.weight, w, is_weight=True)
    once = (*quantized, Kernel(_MASK_MAIN_GRAD * w))
    own = _input_kernels(scheme.input, x, x // sequence_shards, is_codes=is_codes, fuses=fuses)
    forward = (*own.forward, eight_bit if is_codes else gemm)
    if backward == "bf16" or not is_codes:
        decoded_w: Kernels = (Kernel(_DECODE * w),) if is_codes else ()
        gradients = (*decoded_w, gemm, *own.decoded, gemm)
    else:
        # The operands' codes are turned, so that the summed dimension is the last one of both.
        rounded = Kernel(_ENCODE * y)
        into_w = Kernel(_CODE * (x + y) + _VALUE * w, flops, is_eight_bit=True)
        turned_w, turned_x = Kernel(_TRANSPOSE * w), Kernel(_TRANSPOSE * x)
        gradients = (rounded, *_small(1), turned_w, eight_bit, rounded, turned_x, into_w)
    return LinearKernels(once, forward, (*gradients, add, *own.masked))


@dataclass(frozen=True)
class StepEstimate:
    """A modelled step in units of the BF16 step.

    Attributes:
        ratio: Of whole steps.
        forward: Of the linears' forward passes (with SwiGLU, where that was counted).
        backward: Of their backward passes.
        once: What is done once per step, as a share of the whole BF16 step.
    """

    ratio: float
    forward: float
    backward: float
    once: float


def estimate(
    linears: Iterable[tuple[LinearKernels, LinearKernels]], microbatches: int, card: Card
) -> StepEstimate:
    """Of pairs of a linear as it is quantized and as it is in BF16."""
    pairs = list(linears)

    def total(which: int, part: str) -> float:
        return sum(seconds(getattr(pair[which], part), card) for pair in pairs)

    forward, backward = total(0, "forward"), total(0, "backward")
    plain_forward, plain_backward = total(1, "forward"), total(1, "backward")
    others = total(1, "activation")
    step = microbatches * (plain_forward + plain_backward - others) / LINEAR_SHARE
    once = total(0, "once")
    extra = once + microbatches * (forward + backward - plain_forward - plain_backward)
    return StepEstimate(
        1 + extra / step, forward / plain_forward, backward / plain_backward, once / step
    )


def modelled_step(plan: RunPlan, *, card: Card = H100) -> dict[str, str]:
    """A line for `mqat plan`: the step of this configuration against the same one in BF16.

    Nothing where no linear is quantized, or with experts, whose numbers of tokens nobody knows. Of
    activations SwiGLU is counted with the linears; others are computed alike in both.
    """
    schemes = linear_schemes(plan.layers)
    if not schemes or plan.model.num_experts:
        return {}
    settings, model = plan.config.model, plan.model
    whole = settings.micro_batch_size * settings.data.seq_length
    tokens = whole // settings.context_parallel_size
    microbatches = settings.global_batch_size // (settings.micro_batch_size * plan.data_parallel)
    tp = settings.tensor_model_parallel_size
    pairs = []
    for linear in model.linears:
        outputs, inputs = linear.shape(model)
        is_column = linear.parallel == "column"
        shards = tp if is_column and settings.sequence_parallel else 1
        sizes = (tokens, outputs // tp, inputs) if is_column else (tokens, outputs, inputs // tp)
        names = (in_layer(i, linear.name) for i in range(model.num_layers))
        for scheme, count in Counter(map(schemes.get, names)).items():
            activated = linear.activation is not None and model.architecture.activation == "silu"
            used = linear_kernels(
                scheme, *sizes, backward=plan.config.quantization.backward, sequence_shards=shards,
                is_activated=activated,
            )  # fmt: skip
            pairs += [(used, linear_kernels(None, *sizes, is_activated=activated))] * count
    found = estimate(pairs, microbatches, card)
    return {
        f"modelled step on {card.name}": f"{found.ratio:.2f} of BF16 (linears: forward "
        f"{found.forward:.2f}, backward {found.backward:.2f}; weight quantization {found.once:.3f} of "
        f"a step; linears {LINEAR_SHARE:.0%} of a BF16 step, as at hidden 4096; {tokens} tokens x "
        f"{microbatches} microbatches), not measured"
    }

"""The fast path against the fake-quantized reference, and weights that change under it."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch

from mqat.evaluation.forward import forward_loss, run_microbatches
from mqat.kernels.operators import decode
from mqat.kernels.reference import unpack_mask
from mqat.parallel import quantized_gemm
from mqat.parallel.linear import quantized_linears
from mqat.parallel.quantized_step import quantized_step
from mqat.parallel.step_weights import GemmKind, encode_weight, encodes_input, gemm_kind
from mqat.quant.algorithm import named_scheme
from mqat.quant.formats import FORMATS, INT8
from mqat.quant.granularity import PerChannel, PerGroup
from mqat.quant.scheme import LinearScheme, TensorScheme
from tests.unit.model_fixtures import microbatches

STATIC = ["int8", "int8_wo", "int4", "int4_w_int8_a", "fp8", "w_int4_sym"]
PER_TOKEN = ["int8_pc_pt", "fp8_pc_pt", "8da4w"]
QUANTIZED = [*STATIC, *PER_TOKEN]
BLOCKS = ["nvfp4", "mxfp4", "mxfp8", "nf4", "w_uint4_asym"]  # only the weight is kept otherwise


def use_reference(chunks, is_reference: bool) -> None:
    for linear in quantized_linears(chunks).values():
        linear.is_reference = is_reference


def loss_and_gradients(chunks):
    from mqat.training.step import forward_backward

    for chunk in chunks:
        chunk.zero_grad_buffer()
    loss = forward_backward(chunks, microbatches())["loss"]
    return loss, {n: p.main_grad.clone() for n, p in chunks[0].named_parameters()}


def linear_alone(linear, dtype, is_reference):
    """Output and gradients of one linear on a fixed input that clips."""
    generator = torch.Generator().manual_seed(5)
    quantizer = linear.input_quantizer
    is_static = quantizer is not None and not quantizer.scheme.is_dynamic
    # Half the largest code that is not clipped.
    size = float(quantizer.scale) * quantizer.scheme.format.qmax / 2 if is_static else 2.0
    x = (torch.randn(24, 2, linear.weight.shape[1], generator=generator) * size).to(dtype)
    x.requires_grad_()
    linear.is_reference = is_reference
    linear.weight.grad = None
    y, _ = linear(x)
    dy = torch.randn(y.shape, generator=generator).to(dtype)
    dx, dw = torch.autograd.grad(y, [x, linear.weight], dy)
    return y.detach().float(), dx.float(), dw.float()


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", ["mlp.linear_fc1", "mlp.linear_fc2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("algorithm", [*QUANTIZED, *BLOCKS])
def test_one_linear_equals_the_reference(calibrated, backend, algorithm, dtype, name):
    linear = quantized_linears(calibrated(algorithm, dtype))[f"decoder.layers.0.{name}"]
    fast = linear_alone(linear, dtype, is_reference=False)
    reference = linear_alone(linear, dtype, is_reference=True)
    # float32: the same products added in another order. bfloat16: the reference rounds dequantized
    # operands to 8 bits (2**-9 each), the fast path of codes does not.
    limit = 1e-5 if dtype == torch.float32 else 2.0**-7
    for found, expected in zip(fast, reference, strict=True):
        assert relative(found, expected) <= limit
    for found, expected in zip(fast[1:], reference[1:], strict=True):
        # Zeros of a gradient are where the straight-through estimator blocks it, or (a few in bfloat16)
        # where a sum cancels, which leaves the other side a number far below the usual size.
        differ = (found == 0) != (expected == 0)
        assert int(differ.sum()) <= 2
        assert bool(((found - expected).abs()[differ] < 1e-2 * expected.std()).all())
    is_clipped = algorithm not in ("nf4", "nvfp4", "mxfp4", "mxfp8")
    assert int((fast[2] == 0).sum()) > 0 or not is_clipped  # control
    if algorithm not in [*PER_TOKEN, *BLOCKS] and linear.input_quantizer is not None:
        assert int((fast[1] == 0).sum()) > 0  # and some input


def test_an_input_of_one_scale_that_is_not_kept_as_codes_equals_the_reference(calibrated):
    chunks = calibrated("int4_w_int8_a", torch.float32)
    linear = quantized_linears(chunks)["decoder.layers.0.mlp.linear_fc1"]
    quantizer = linear.input_quantizer
    quantizer.scheme = replace(quantizer.scheme, format=FORMATS["int6"])
    assert not encodes_input(quantizer.scheme)
    fast = linear_alone(linear, torch.float32, is_reference=False)
    reference = linear_alone(linear, torch.float32, is_reference=True)
    for found, expected in zip(fast, reference, strict=True):
        assert relative(found, expected) <= 1e-5
    assert int((fast[1] == 0).sum()) > 0  # some input is clipped


@pytest.mark.parametrize("recompute", [None, "full", "selective"])
@pytest.mark.parametrize("algorithm", QUANTIZED)
def test_a_whole_step_equals_the_reference(calibrated, algorithm, recompute):
    chunks = calibrated(algorithm, recompute=recompute)
    fast_loss, fast = loss_and_gradients(chunks)
    use_reference(chunks, True)
    loss, expected = loss_and_gradients(chunks)
    # Sums in another order move single codes of later layers by one.
    assert fast_loss == pytest.approx(loss, rel=1e-4)
    for name, gradient in expected.items():
        assert relative(fast[name], gradient) < 2e-2, name
    for linear in quantized_linears(chunks).values():
        for quantizer in linear.quantizers.values():
            quantizer.is_enabled = False
    assert loss_and_gradients(chunks)[0] != pytest.approx(loss, rel=1e-4)  # control


def test_codes_are_multiplied_where_both_operands_have_them():
    weight = TensorScheme(INT8, PerChannel())
    assert gemm_kind(named_scheme("int8")) is GemmKind.CODES
    assert gemm_kind(named_scheme("fp8")) is GemmKind.CODES
    assert gemm_kind(named_scheme("int4")) is GemmKind.VALUES
    assert gemm_kind(named_scheme("int4_w_int8_a")) is GemmKind.VALUES
    assert gemm_kind(None) is None
    assert gemm_kind(named_scheme("int8_pc_pt")) is GemmKind.CODES
    assert gemm_kind(named_scheme("fp8_pc_pt")) is GemmKind.CODES
    assert gemm_kind(named_scheme("8da4w")) is GemmKind.VALUES
    for other in ("nvfp4", "mxfp8", "nf4", "w_uint4_asym"):
        assert gemm_kind(named_scheme(other)) is GemmKind.VALUES
    per_group = LinearScheme("new", weight, TensorScheme(INT8, PerGroup(64), is_dynamic=True))
    assert gemm_kind(per_group) is GemmKind.VALUES
    fp8_weight_only = LinearScheme("new", named_scheme("fp8").weight, None)
    assert gemm_kind(fp8_weight_only) is GemmKind.VALUES
    assert gemm_kind(LinearScheme("new", None, named_scheme("fp8").input)) is None


@pytest.mark.parametrize("algorithm", ["int8", *BLOCKS])
def test_weights_are_quantized_once_per_step_for_all_microbatches(
    calibrated, monkeypatch, algorithm
):
    from mqat.parallel import step_weights

    chunks = calibrated(algorithm, recompute="full")
    calls = []
    encode = step_weights.encode_weight
    monkeypatch.setattr(
        step_weights, "encode_weight", lambda *a, **k: calls.append(1) or encode(*a, **k)
    )
    loss_and_gradients(chunks)
    linears = quantized_linears(chunks)
    assert len(calls) == len(linears)
    assert all(linear.weight_cache is None for linear in linears.values())
    run_microbatches(forward_loss, chunks, microbatches(), forward_only=False)  # control: no scope
    assert len(calls) == len(linears) + 2 * 2 * len(linears)  # 2 microbatches, forward twice


@pytest.mark.parametrize("algorithm", [*QUANTIZED, *BLOCKS])
def test_what_is_kept_of_a_weight_is_what_its_quantizer_gives(calibrated, algorithm):
    linear = quantized_linears(calibrated(algorithm))["decoder.layers.1.mlp.linear_fc2"]
    weight, quantizer = linear.weight, linear.weight_quantizer
    used = encode_weight(weight, quantizer, linear.gemm_kind, with_mask=True)
    values = used.operand
    if used.scale is not None:
        values = decode(
            used.operand, weight.dtype, scale=used.scale, granularity=quantizer.scheme.granularity
        )
    expected = quantizer(weight)
    assert torch.equal(values, expected)
    (passed,) = torch.autograd.grad(expected.sum(), weight)
    assert torch.equal(unpack_mask(used.mask, tuple(weight.shape)), passed.to(torch.uint8))


@pytest.mark.parametrize("algorithm", ["int8", "nvfp4"])
def test_nothing_is_kept_of_a_weight_between_scopes(calibrated, algorithm):
    chunks = calibrated(algorithm)
    linears = quantized_linears(chunks).values()
    kept = []
    for is_training in (True, False):
        with quantized_step(chunks, for_backward=is_training):
            run_microbatches(forward_loss, chunks, microbatches(), forward_only=not is_training)
            kept += [weakref.ref(linear.step_weight._used.operand) for linear in linears]
            assert all(reference() is not None for reference in kept[-len(linears) :])  # control
        gc.collect()  # graphs
        assert all(reference() is None for reference in kept)
        assert sum(linear.step_weight.num_bytes for linear in linears) == 0


def test_a_backward_that_comes_after_the_next_step_began_is_refused(calibrated):
    chunks = calibrated("int8")
    linear = next(iter(quantized_linears(chunks).values()))
    x = torch.randn(8, 1, 128)
    with quantized_step(chunks):
        late = linear(x)[0].sum()
    late.backward(retain_graph=True)  # control: weights have not changed yet
    with quantized_step(chunks):
        with pytest.raises(ValueError, match="Run backward before it opens"):
            late.backward()


def test_codes_held_for_a_step_take_a_byte_and_a_bit_per_parameter(calibrated):
    for algorithm, dtype, limit in (
        ("int8", torch.bfloat16, 1.25),
        ("fp8", torch.bfloat16, 1.25),
        ("int4", torch.bfloat16, 2.25),
        ("int4_w_int8_a", torch.bfloat16, 2.25),
    ):
        chunks = calibrated(algorithm, dtype)
        linears = quantized_linears(chunks).values()
        with quantized_step(chunks):
            run_microbatches(forward_loss, chunks, microbatches(4), forward_only=False)
            held = sum(linear.weight_cache.num_bytes for linear in linears)
        parameters = sum(linear.weight.numel() for linear in linears)
        assert 0.5 < held / parameters <= limit, algorithm


def test_scopes_do_not_nest(calibrated):
    chunks = calibrated("int8")
    with quantized_step(chunks):
        with pytest.raises(ValueError, match="already open"):
            with quantized_step(chunks):
                pass
        assert next(iter(quantized_linears(chunks).values())).weight_cache is not None
    with quantized_step(chunks):  # and an exception leaves it usable
        pass


def fresh_loss(chunks):
    """Loss by the reference path, which keeps nothing."""
    from mqat.evaluation.forward import evaluate

    use_reference(chunks, True)
    loss = evaluate(chunks, [microbatches()])[0]
    use_reference(chunks, False)
    return loss


def shrink_views_(chunks):
    """Writes weights as the distributed optimizer does: no version counter moves."""
    for linear in quantized_linears(chunks).values():
        before = linear.weight._version
        linear.weight.data.view(-1).mul_(0.5)
        assert linear.weight._version == before


def test_weights_written_between_any_two_passes_are_seen(calibrated):
    from mqat.evaluation.forward import evaluate, logits
    from mqat.training.step import forward_backward

    chunks = calibrated("int8")
    tokens = microbatches()[0]["tokens"]
    passes = {
        "train": lambda: forward_backward(chunks, microbatches())["loss"],
        "evaluate": lambda: evaluate(chunks, [microbatches()])[0],
        "logits": lambda: float(logits(chunks, tokens).square().mean()),
    }
    for name in [first + " " + second for first in passes for second in passes]:
        first, second = name.split()
        passes[first]()
        stale = passes["evaluate"]()
        passes[first]()
        shrink_views_(chunks)
        found = passes[second]()
        expected = fresh_loss(chunks)
        if second != "logits":
            assert found == pytest.approx(expected, rel=1e-4), name
        assert passes["evaluate"]() == pytest.approx(expected, rel=1e-4), name
        assert stale != pytest.approx(expected, rel=1e-4), name  # control: the write mattered
        for linear in quantized_linears(chunks).values():
            linear.weight.data.mul_(2.0)


def test_an_ordinary_write_or_a_new_scale_inside_the_scope_is_noticed(calibrated):
    chunks = calibrated("int8")
    linear = next(iter(quantized_linears(chunks).values()))
    x = torch.randn(8, 1, 128)
    with quantized_step(chunks), torch.no_grad():
        first = linear(x)[0]
        linear.weight.mul_(0.5)
        assert relative(linear(x)[0], first) > 0.1
        second = linear(x)[0]
        linear.weight_quantizer.load_({"scale": linear.weight_quantizer.scale * 0.1})
        assert relative(linear(x)[0], second) > 0.1


def test_quantization_that_starts_late_or_pauses_takes_effect_at_once(calibrated):
    chunks = calibrated("int8")
    linears = quantized_linears(chunks).values()
    quantized = loss_and_gradients(chunks)[0]

    def enable(on):
        for linear in linears:
            for quantizer in linear.quantizers.values():
                quantizer.is_enabled = on

    enable(False)
    plain = loss_and_gradients(chunks)[0]
    enable(True)
    assert plain != pytest.approx(quantized, rel=1e-5)
    assert loss_and_gradients(chunks)[0] == quantized


@pytest.mark.parametrize("algorithm", STATIC)
def test_a_frozen_weight_passes_gradients_through_and_keeps_no_input(calibrated, algorithm):
    linear = quantized_linears(calibrated(algorithm))["decoder.layers.0.mlp.linear_fc1"]
    linear.weight.requires_grad_(False)
    kept = []

    def gradient(is_reference):
        linear.is_reference = is_reference
        x = torch.randn(8, 1, 128, generator=torch.Generator().manual_seed(0)).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: kept.append(t.numel() * t.element_size()) or t, lambda t: t
        ):
            y, _ = linear(x)
        return torch.autograd.grad(y.square().sum(), x)[0]

    fast = gradient(False)
    assert sum(kept[:-1]) <= 8 * 128 / 8 + 64  # a bit per element and a scale; [-1] is square()'s
    assert relative(fast, gradient(True)) < 1e-5


def test_nan_weights_and_inputs_are_not_hidden_by_codes(calibrated):
    for algorithm in QUANTIZED:
        linear = quantized_linears(calibrated(algorithm))["decoder.layers.0.mlp.linear_fc1"]
        x = torch.randn(8, 1, 128)
        x[0, 0, 0] = float("nan")
        assert bool(linear(x)[0].isnan().any()), algorithm
        with torch.no_grad():
            linear.weight[3, 3] = float("nan")
        assert bool(linear(torch.randn(8, 1, 128))[0].isnan().any()), algorithm


@pytest.mark.parametrize("algorithm", ["int8", "int4"])
def test_outputs_may_be_changed_in_place_as_vocabulary_losses_do(calibrated, algorithm):
    linear = quantized_linears(calibrated(algorithm))["decoder.layers.0.mlp.linear_fc1"]
    gradients = []
    for in_place in (True, False):
        x = torch.ones(8, 1, 128, requires_grad=True)
        output, _ = linear(x)
        output = output.mul_(3) if in_place else output * 3
        output.sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients) and bool(gradients[0].any())


@pytest.mark.parametrize("algorithm", ["int8", "int4_w_int8_a", "fp8", "8da4w"])
def test_gradients_added_to_main_grad_at_once_are_those_megatron_would_add(
    calibrated, monkeypatch, backend, algorithm
):
    chunks = calibrated(algorithm, torch.bfloat16)
    weights = [linear.weight for linear in quantized_linears(chunks).values()]
    found = loss_and_gradients(chunks)[1]
    assert all(weight.grad_added_to_main_grad for weight in weights)
    with monkeypatch.context() as patch:
        patch.setattr(quantized_gemm, "accumulates", lambda node: False)
        expected = loss_and_gradients(chunks)[1]
    assert not any(weight.grad_added_to_main_grad for weight in weights)
    for name, gradient in expected.items():
        assert relative(found[name], gradient) < 2e-2, name
    # The same microbatches twice have the same mean gradient: nothing is dropped or counted twice.
    double = []
    for repeats in (1, 2):
        for chunk in chunks:
            chunk.zero_grad_buffer()
        with quantized_step(chunks):
            run_microbatches(forward_loss, chunks, microbatches() * repeats, forward_only=False)
        double.append([weight.main_grad.clone() for weight in weights])
    for once, twice in zip(*double, strict=True):
        assert relative(twice, once) < 1e-2


@pytest.mark.parametrize("order", [(False, True), (True, False)])
def test_fast_and_reference_microbatches_of_one_step_both_count(calibrated, order):
    chunks = calibrated("int8")
    weights = [linear.weight for linear in quantized_linears(chunks).values()]
    totals = []
    for is_reference in (order, order[:1], order[1:]):
        for chunk in chunks:
            chunk.zero_grad_buffer()
        losses = []
        for reference, batch in zip(is_reference, microbatches()[: len(is_reference)], strict=True):
            use_reference(chunks, reference)
            args = batch["tokens"], batch["position_ids"], batch["attention_mask"]
            losses.append(chunks[0](*args, labels=microbatches()[0]["labels"]).sum())
        for loss in losses:  # all forward before any backward, as pipelines do
            loss.backward()
        totals.append([weight.main_grad.clone() for weight in weights])
    use_reference(chunks, False)
    assert all(bool(grad.any()) for grad in totals[0])
    for both, first in zip(totals[0], totals[1], strict=True):
        assert relative(both, first) > 0.1  # control: the second microbatch matters


def test_gradients_that_are_asked_for_go_to_the_caller_and_nowhere_else(calibrated):
    linear = quantized_linears(calibrated("int8"))["decoder.layers.0.mlp.linear_fc1"]
    linear.weight.main_grad.zero_()
    x = torch.randn(8, 1, 128, requires_grad=True)
    (found,) = torch.autograd.grad(linear(x)[0].sum(), [linear.weight])
    assert not bool(linear.weight.main_grad.any())
    linear(x)[0].sum().backward()
    assert bool(linear.weight.main_grad.any())  # control
    torch.testing.assert_close(linear.weight.main_grad, found, rtol=1e-5, atol=1e-5)


def test_plain_loops_without_megatrons_buffers_get_masked_gradients(calibrated):
    linear = quantized_linears(calibrated("int8"))["decoder.layers.0.mlp.linear_fc1"]
    weight = torch.nn.Parameter(linear.weight.detach().clone())
    x = torch.randn(8, 1, 128)
    linear(x, weight=weight)[0].sum().backward()
    (expected,) = torch.autograd.grad(linear(x)[0].sum(), [linear.weight])
    assert torch.equal(weight.grad, expected)

"""Weight gradients masked once a step, Megatron's own ways of adding them up, and 8-bit gradients."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch

from mqat.errors import UserError
from mqat.evaluation.forward import forward_loss, run_microbatches
from mqat.parallel import linear_gradients, low_precision_backward, step_weights
from mqat.parallel.backward_formats import check_backward
from mqat.parallel.linear import quantized_linears
from mqat.parallel.low_precision_backward import set_backward_
from mqat.parallel.quantized_step import quantized_step
from mqat.quant.algorithm import named_scheme
from tests.unit.model_fixtures import microbatches
from tests.unit.parallel.test_fast_path import loss_and_gradients, relative


def masked_at_once(monkeypatch):
    monkeypatch.setattr(step_weights.WeightCache, "masks_later", lambda *_: False)


@pytest.fixture(params=[False, True], ids=["", "overlap"])
def overlap(request, monkeypatch):
    from mqat.training import optimizer

    wrap = partial(optimizer.wrap_for_training, options={"overlap_grad_reduce": request.param})
    monkeypatch.setattr(optimizer, "wrap_for_training", wrap)


@pytest.mark.parametrize("algorithm", ["int8", "int4_w_int8_a", "w_uint4_asym"])
def test_masking_the_sum_is_summing_the_masked_bit_for_bit(
    calibrated, monkeypatch, overlap, algorithm
):
    chunks = calibrated(algorithm)
    linears = quantized_linears(chunks)
    loss, found = loss_and_gradients(chunks)
    with monkeypatch.context() as patch:
        masked_at_once(patch)
        expected_loss, expected = loss_and_gradients(chunks)
    assert loss == expected_loss
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())
    with monkeypatch.context() as patch:  # control: a mask matters in every linear
        patch.setattr(step_weights.WeightCache, "mask_gradient_", lambda *_: None)
        loss_and_gradients(chunks)
    for name, linear in linears.items():
        (key,) = (k for k in expected if k.endswith(f"{name}.weight"))
        assert not torch.equal(linear.weight.main_grad, expected[key]), name


def test_gradients_without_ddp_are_masked_at_the_end_as_well(calibrated, monkeypatch):
    monkeypatch.setattr("mqat.training.optimizer.wrap_for_training", list)
    chunks = calibrated("int8")
    weight = quantized_linears(chunks)["decoder.layers.0.mlp.linear_fc1"].weight

    def gradient():
        weight.grad = None
        with quantized_step(chunks):
            run_microbatches(forward_loss, chunks, microbatches(), forward_only=False)
        return weight.grad

    found = gradient()
    with monkeypatch.context() as patch:
        masked_at_once(patch)
        expected = gradient()
    assert torch.equal(found, expected) and bool((found == 0).any())


def test_a_gradient_that_a_caller_asks_for_inside_the_scope_is_masked(calibrated):
    chunks = calibrated("int8")
    linear = quantized_linears(chunks)["decoder.layers.0.mlp.linear_fc1"]
    x = torch.randn(8, 1, 128, generator=torch.Generator().manual_seed(0))
    outside = torch.autograd.grad(linear(x)[0].square().sum(), linear.weight)[0]
    with quantized_step(chunks):
        inside = torch.autograd.grad(linear(x)[0].square().sum(), linear.weight)[0]
    assert torch.equal(inside, outside) and bool((inside == 0).any())


def test_a_tied_weight_keeps_what_its_lookup_adds(calibrated):
    chunks = calibrated("int8")
    linear = quantized_linears(chunks)["decoder.layers.0.mlp.linear_fc1"]
    linear.weight.shared_embedding = True
    x = torch.randn(8, 1, 128)
    with quantized_step(chunks):
        linear(x)[0].square().sum().backward()
        linear.weight.main_grad.add_(1.0)  # of the embedding, which no mask applies to
    assert bool((linear.weight.main_grad == 1.0).any())
    assert not bool((linear.weight.main_grad == 0.0).any())


def test_a_reduction_that_outlives_the_scope_is_refused(calibrated):
    chunks = calibrated("int8")
    with pytest.raises(UserError, match="finish_grad_sync"):
        with quantized_step(chunks):
            chunks[0].bucket_groups[0].grad_reduce_handle = object()
    chunks[0].bucket_groups[0].grad_reduce_handle = None
    with quantized_step(chunks):  # the failed scope is closed
        pass


def fused_kernel(calls):
    def accumulate(x, dy, main_grad):
        calls.append(tuple(x.shape))
        main_grad.add_(dy.float().t() @ x.float())

    return SimpleNamespace(wgrad_gemm_accum_fp32=accumulate)


@pytest.mark.parametrize("algorithm", ["int8", "int4", "fp8_pc_pt", "nvfp4"])
def test_gradient_accumulation_fusion_is_honoured(calibrated, monkeypatch, algorithm):
    chunks = calibrated(algorithm)
    linears = quantized_linears(chunks).values()
    _, expected = loss_and_gradients(chunks)
    calls: list[tuple[int, ...]] = []
    monkeypatch.setattr(
        linear_gradients.megatron_layers, "fused_weight_gradient_mlp_cuda", fused_kernel(calls),
        raising=False,
    )  # fmt: skip
    for linear in linears:
        linear.gradient_accumulation_fusion = True
        linear.config.gradient_accumulation_fusion = True
    _, found = loss_and_gradients(chunks)
    assert len(calls) == 2 * len(linears)  # two microbatches
    assert all(linear.weight.grad_added_to_main_grad for linear in linears)
    for name, gradient in expected.items():
        assert relative(found[name], gradient) < 1e-4, name
    next(iter(linears)).is_reference = True
    with pytest.raises(UserError, match="gradient_accumulation_fusion"):
        loss_and_gradients(chunks)
    for linear in linears:  # before fake quantization starts, Megatron's own function does it
        linear.weight_quantizer.is_enabled = False
    loss_and_gradients(chunks)
    assert len(calls) == 4 * len(linears)


@pytest.mark.parametrize("algorithm", ["int8", "int4_w_int8_a", "nvfp4"])
def test_a_deferred_gradient_is_that_of_the_quantized_input_and_masked(calibrated, algorithm):
    chunks = calibrated(algorithm)
    linear = quantized_linears(chunks)["decoder.layers.0.mlp.linear_fc1"]
    inputs = [torch.randn(8, 2, 128, generator=torch.Generator().manual_seed(i)) for i in range(3)]

    def passes(defer):
        chunks[0].zero_grad_buffer()
        kept, gradients = [], []
        linear.embedding_activation_buffer = kept
        with quantized_step(chunks):
            for x in inputs:
                if defer and len(kept) < 2:  # wgrad_deferral_limit
                    kept.append(x)
                y = linear._forward_impl(
                    input=x, weight=linear.weight, bias=None, gradient_accumulation_fusion=False,
                    allreduce_dgrad=False, sequence_parallel=False, tp_group=linear.tp_group,
                    grad_output_buffer=gradients if defer else None,
                )  # fmt: skip
                y.square().sum().backward()
            assert len(gradients) == (2 if defer else 0)
            for x, dy in zip(kept, gradients, strict=True):  # Megatron, at the end of the pipeline
                linear.weight.main_grad.add_(dy.flatten(0, 1).t() @ x.flatten(0, 1))
        return linear.weight.main_grad.clone()

    assert relative(passes(True), passes(False)) < 1e-5
    linear.is_reference = True
    with pytest.raises(UserError, match="defer_embedding_wgrad_compute=True"):
        passes(True)
    linear.is_reference = False
    linear.weight.shared_embedding = True
    with pytest.raises(UserError, match="not tied"):
        passes(True)


BACKWARDS = [("int8", "int8"), ("int8_pc_pt", "int8"), ("fp8", "fp8"), ("fp8_pc_pt", "fp8")]


def test_a_deferred_gradient_in_8_bits_is_refused(calibrated):
    chunks = calibrated("int8")
    linear = quantized_linears(chunks)["decoder.layers.0.mlp.linear_fc1"]
    x = torch.randn(8, 2, 128).requires_grad_()
    how = {
        "bias": None, "gradient_accumulation_fusion": False, "allreduce_dgrad": False,
        "sequence_parallel": False, "tp_group": linear.tp_group, "grad_output_buffer": [],
    }  # fmt: skip
    linear.embedding_activation_buffer = [x]
    linear._forward_impl(x, linear.weight, **how)  # control: exact ones may be
    set_backward_(chunks, "int8")
    linear.embedding_activation_buffer = [x]
    message = "backward=int8, fp8 .* defer_embedding_wgrad_compute"
    with pytest.raises(UserError, match=message):
        linear._forward_impl(x, linear.weight, **how)
    with torch.no_grad():  # nothing is deferred
        linear._forward_impl(x, linear.weight, **how)


def linear_gradients_of(linear, repeats=1):
    """Mean of both gradients over new noise, on a fixed input."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(24, 2, linear.weight.shape[1], generator=generator).requires_grad_()
    dy = torch.randn(24, 2, linear.weight.shape[0], generator=generator)
    dy = dy * torch.logspace(-3, 0, 24)[:, None, None]  # tokens of very different weight
    sums = [0.0, 0.0]
    for _ in range(repeats):
        grads = torch.autograd.grad(linear(x)[0], [x, linear.weight], dy)
        sums = [s + g for s, g in zip(sums, grads, strict=True)]
    return [s / repeats for s in sums]


@pytest.mark.parametrize("algorithm, backward", BACKWARDS)
def test_8_bit_gradients_are_noisy_and_unbiased(calibrated, backend, algorithm, backward):
    chunks = calibrated(algorithm)
    linear = quantized_linears(chunks)["decoder.layers.0.mlp.linear_fc1"]
    exact = linear_gradients_of(linear)
    set_backward_(chunks, backward, seed=1)
    once, often = linear_gradients_of(linear), linear_gradients_of(linear, 64)
    limit = {"int8": 0.02, "fp8": 0.06}[backward]
    for name, one, many, expected in zip(("dx", "dw"), once, often, exact, strict=True):
        assert 1e-3 < relative(one, expected) < limit, name  # the rounding is really there
        # 64 draws: an eighth of the noise, if it has no bias.
        assert relative(many, expected) < relative(one, expected) / 5, name
        assert bool((one[expected == 0] == 0).all()), name  # clipped
    set_backward_(chunks, "bf16")
    assert all(torch.equal(a, b) for a, b in zip(linear_gradients_of(linear), exact, strict=True))


@pytest.mark.parametrize("recompute", [None, "full"])
def test_noise_depends_on_seed_step_and_microbatch_only(calibrated, recompute):
    def gradients(chunks, step):
        chunks[0].zero_grad_buffer()
        with quantized_step(chunks, step=step):
            run_microbatches(forward_loss, chunks, microbatches(), forward_only=False)
        return torch.cat([x.weight.main_grad.flatten() for x in quantized_linears(chunks).values()])

    chunks = calibrated("int8", recompute=recompute)
    exact = gradients(chunks, 3)
    found = {}
    for seed, step in ((1, 3), (1, 3), (1, 4), (2, 3)):
        set_backward_(chunks, "int8", seed=seed)
        gradient = gradients(chunks, step)
        assert torch.equal(found.setdefault((seed, step), gradient), gradient)
        assert 1e-3 < relative(gradient, exact) < 0.1
    assert not torch.equal(found[1, 3], found[1, 4]) and not torch.equal(found[1, 3], found[2, 3])
    gradients(chunks, 3)
    assert torch.equal(gradients(chunks, 3), found[2, 3])  # nothing is left of earlier steps


def test_ranks_of_data_and_context_parallelism_have_noise_of_their_own(calibrated, monkeypatch):
    chunks = calibrated("int8")
    linear = quantized_linears(chunks)["decoder.layers.0.mlp.linear_fc1"]
    exact, noises = linear_gradients_of(linear), []
    for rank in (0, 1):
        monkeypatch.setattr(low_precision_backward, "_data_rank", lambda rank=rank: rank)
        for _ in range(2):  # control: the same on one rank
            set_backward_(chunks, "int8", seed=1)
            noise = [f - e for f, e in zip(linear_gradients_of(linear), exact, strict=True)]
            noises.append(torch.cat([n.flatten() for n in noise]))
    assert torch.equal(noises[0], noises[1]) and torch.equal(noises[2], noises[3])
    assert abs(float(torch.corrcoef(torch.stack([noises[0], noises[2]]))[0, 1])) < 0.05


def test_gradients_that_are_not_finite_stay_so(calibrated):
    chunks = calibrated("int8")
    set_backward_(chunks, "int8")
    linear = quantized_linears(chunks)["decoder.layers.0.mlp.linear_fc1"]
    x = torch.randn(8, 1, 128).requires_grad_()
    for value in (float("nan"), float("inf")):
        dy = torch.zeros(8, 1, linear.weight.shape[0])
        dy[2, 0, 5] = value
        dx, dw = torch.autograd.grad(linear(x)[0], [x, linear.weight], dy)
        assert not bool(dx[2].isfinite().all()) and bool(dx[3].isfinite().all())
        assert not bool(dw[5].isfinite().all()) and bool(dw[6].isfinite().all())


def test_what_has_no_8_bit_operands_is_refused_by_name(calibrated):
    layers = {"a": named_scheme("int8"), "b": named_scheme("int8_wo")}
    check_backward("int8", {"a": layers["a"]})
    check_backward("bf16", layers)
    check_backward("fp8", {"a": named_scheme("fp8")})
    for backward, schemes, message in (
        ("int8", layers, r"backward=int8: b has \{'weight': 'int8"),
        ("fp8", {"a": layers["a"]}, "both fp8"),
        ("int8", {"a": named_scheme("fp8")}, "fp8_e4m3"),
        ("int8", {"a": named_scheme("int4_w_int8_a")}, "int4"),
        ("int8", {}, "no linear is quantized"),
        ("int4", layers, "is not one of"),
    ):
        with pytest.raises(UserError, match=message):
            check_backward(backward, schemes)
    from mqat.parallel.learned_scales import learn_scales_

    chunks = calibrated("int8")
    learn_scales_(chunks, inputs="lsq")
    with pytest.raises(UserError, match="trains its input scale"):
        set_backward_(chunks, "int8")

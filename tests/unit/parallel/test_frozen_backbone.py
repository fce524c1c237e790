import pytest
import torch

from mqat.parallel.linear import quantized_linears
from mqat.parallel.pack_weights import pack_weights_
from tests.unit.model_fixtures import microbatches, switch_off


def trained_gradients(chunks):
    """Of everything but the quantized linears, which are frozen."""
    for linear in quantized_linears(chunks).values():
        linear.weight.requires_grad_(False)
    chunks[0].zero_grad_buffer()
    batch = microbatches()[0]
    chunks[0](batch["tokens"], batch["position_ids"], None, labels=batch["labels"]).sum().backward()
    named = chunks[0].module.named_parameters()
    return {name: x.main_grad.clone() for name, x in named if x.requires_grad}


def largest_distance(found, expected):
    assert found.keys() == expected.keys() and len(found) > 4
    return max(float((found[n] - x).norm() / x.norm()) for n, x in expected.items())


@pytest.mark.parametrize("algorithm", ["nf4", "int4", "w_uint4_asym", "int8_wo", "int4_w_int8_a"])
def test_gradients_pass_through_packed_weights(calibrated, algorithm):
    chunks = calibrated(algorithm)
    for linear in quantized_linears(chunks).values():
        linear.is_reference = True
    expected = trained_gradients(chunks)
    pack_weights_(chunks)
    found = trained_gradients(chunks)
    assert largest_distance(found, expected) < 1e-4  # float32 sums in another order
    doubled = {name: 1.01 * x for name, x in expected.items()}
    assert largest_distance(doubled, expected) > 1e-4  # control
    assert all(linear.weight.grad is None for linear in quantized_linears(chunks).values())


def test_nothing_of_a_weight_is_kept_for_backward(calibrated):
    """Neither a float copy nor a mask: only the packed storage exists."""
    chunks = calibrated("nf4")
    pack_weights_(chunks)
    shapes = {linear.packed_weight.shape for linear in quantized_linears(chunks).values()}
    kept = []
    batch = microbatches()[0]
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape) or x, lambda x: x):
        chunks[0](batch["tokens"], batch["position_ids"], None, labels=batch["labels"]).sum()
    assert len(kept) > 10
    assert not shapes & {tuple(shape) for shape in kept}


def test_double_quantization_takes_4_127_bits_and_moves_little(calibrated):
    from mqat.evaluation.forward import logits

    tokens = microbatches()[0]["tokens"]
    chunks = calibrated("nf4")
    for linear in quantized_linears(chunks).values():
        quantizer = linear.weight_quantizer
        frozen = quantizer.frozen_tensors
        quantizer.load_(frozen | {"scale": frozen["scale"] / 0.6})  # undo the fixture's shrinking
    expected = logits(chunks, tokens)
    switch_off(chunks)
    unquantized = logits(chunks, tokens)
    _, after = pack_weights_(chunks, double_quantization=True)
    linears = quantized_linears(chunks).values()
    weights = sum(
        linear.packed_weight.shape[0] * linear.packed_weight.shape[1] for linear in linears
    )
    assert 4.12 < 8 * after / weights < 4.14
    found = logits(chunks, tokens)
    moved, by_nf4 = ((x - expected).norm() / expected.norm() for x in (found, unquantized))
    assert 0 < moved < by_nf4 / 3  # less than the quantization itself


def test_linears_with_8_bit_inputs_have_no_gradient(calibrated):
    chunks = calibrated("int8")
    pack_weights_(chunks)
    with pytest.raises(ValueError, match="weight-only algorithm"):
        trained_gradients(chunks)

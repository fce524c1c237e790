import math

import pytest
import torch

from mqat.config import ModelConfig
from mqat.errors import UserError
from mqat.models.adapters import Adapters
from mqat.models.structure import DENSE_LINEARS, in_layer
from mqat.specs.policy import Policy
from tests.unit.model_fixtures import MODEL, microbatches

NAMES = tuple(in_layer(i, x.name) for i in range(2) for x in DENSE_LINEARS)


@pytest.fixture
def build(world):
    """A model with adapters, whose B is no longer zero."""
    from torch.distributed import group

    from mqat.calibration.calibrate import calibrate
    from mqat.checkpoints.pretrained import load_pretrained_
    from mqat.checkpoints.random_weights import RandomWeights
    from mqat.parallel.add_adapters import adapters_of, add_adapters_
    from mqat.specs.model import build_model

    def built(algorithm, **keys):
        layers = Policy(algorithm, 64).schemes(MODEL)
        chunks = build_model(MODEL, ModelConfig(), layers, torch.float32)
        load_pretrained_(chunks, RandomWeights(MODEL, 1, 0.1))
        add_adapters_(chunks, Adapters(NAMES, 4, 8.0, **keys))
        calibrate(chunks, lambda: None, group=group.WORLD)
        generator = torch.Generator().manual_seed(0)
        for adapter in adapters_of(chunks).values():
            adapter.linear_out.data.normal_(std=0.1, generator=generator)
        return chunks

    return built


def output(chunks, x, name):
    from mqat.parallel.linear import quantized_linears

    return quantized_linears(chunks)[name](x)[0]


def test_an_adapter_adds_its_product_to_what_the_linear_computes(build):
    from mqat.parallel.add_adapters import adapters_of, without_adapters

    chunks, x = build("int4"), torch.randn(5, 2, 128, generator=torch.Generator().manual_seed(1))
    adapter = adapters_of(chunks)[NAMES[0]]
    found = output(chunks, x, NAMES[0])
    with without_adapters(chunks):
        plain = output(chunks, x, NAMES[0])
    added = 2.0 * (x @ adapter.linear_in.t()) @ adapter.linear_out.t()
    torch.testing.assert_close(found, plain + added)
    assert (found - plain).abs().max() > 0.1  # control
    assert math.isclose(
        float(adapter.linear_in.detach().abs().max()), 1 / math.sqrt(128), rel_tol=0.1
    )


def test_a_merged_adapter_is_quantized_with_the_weight(build):
    from mqat.parallel.add_adapters import adapters_of
    from mqat.parallel.linear import quantized_linears
    from mqat.parallel.quantized_step import quantized_step

    chunks, x = build("int4", is_merged=True), torch.randn(5, 2, 128)
    linear, adapter = quantized_linears(chunks)[NAMES[0]], adapters_of(chunks)[NAMES[0]]
    product = adapter.linear_out.double() @ adapter.linear_in.double()
    merged = (linear.weight.double() + 2.0 * product).float().detach().requires_grad_()
    quantized = linear.weight_quantizer(merged)
    with quantized_step(chunks):
        found = output(chunks, x, NAMES[0])
        found.square().sum().backward()
    torch.testing.assert_close(found, x @ quantized.t())
    (x @ quantized.t()).square().sum().backward()
    torch.testing.assert_close(adapter.linear_in.grad, 2.0 * adapter.linear_out.t() @ merged.grad)
    torch.testing.assert_close(adapter.linear_out.grad, 2.0 * merged.grad @ adapter.linear_in.t())
    linear.is_reference = True  # the same through Megatron's own function
    torch.testing.assert_close(output(chunks, x, NAMES[0]), found)
    assert linear.weight.grad is None and not linear.weight.requires_grad


def test_the_merged_weight_depends_on_no_shape():
    from mqat.parallel.lora import merged_weight

    w, a, b = torch.randn(70, 130), torch.randn(3, 130), torch.randn(70, 3)
    whole = merged_weight(w, a, b, 0.7)
    parts = [merged_weight(w[:, s], a[:, s], b, 0.7) for s in (slice(0, 37), slice(37, 130))]
    assert torch.equal(torch.cat(parts, 1), whole)
    assert torch.equal(merged_weight(w[33:], a, b[33:], 0.7), whole[33:])
    torch.testing.assert_close(whole, w + 0.7 * b @ a)


def test_merging_changes_no_output(build):
    from mqat.evaluation.forward import logits
    from mqat.parallel.add_adapters import adapters_of, merge_adapters_

    tokens = microbatches()[0]["tokens"]
    for algorithm, tolerance in (("int4", 0.0), ("null", 1e-4)):
        chunks = build(algorithm, is_merged=True)
        before = logits(chunks, tokens)
        merge_adapters_(chunks)
        assert not adapters_of(chunks)
        torch.testing.assert_close(logits(chunks, tokens), before, rtol=0, atol=tolerance)


def test_dropout_zeroes_about_its_share_in_training_alone(build):
    from mqat.parallel.add_adapters import adapters_of

    adapter = adapters_of(build("null", dropout=0.25))[NAMES[0]]
    x = torch.ones(50, 4, 128)
    adapter.begin_step(3)
    first, second = adapter._dropped(x), adapter._dropped(x)
    assert float((first == 0).float().mean()) == pytest.approx(0.25, abs=0.02)
    assert float(first.max()) == pytest.approx(1 / 0.75)
    assert not torch.equal(first, second)
    adapter.begin_step(3)
    assert torch.equal(adapter._dropped(x), first)
    assert adapter.eval()._dropped(x) is x


def test_recomputed_modules_of_the_first_layer_are_trained_too(world):
    from mqat.checkpoints.pretrained import load_pretrained_
    from mqat.checkpoints.random_weights import RandomWeights
    from mqat.parallel.add_adapters import adapters_of, add_adapters_
    from mqat.specs.model import build_model

    settings = ModelConfig(activations_checkpoint_granularity="selective")
    chunks = build_model(MODEL, settings, {}, torch.float32)
    for layer in chunks[0].decoder.layers:
        layer.recompute_mlp = True  # as a loop of one's own may ask for, by `recompute_modules`
    load_pretrained_(chunks, RandomWeights(MODEL, 1, 0.1))
    add_adapters_(chunks, Adapters(tuple(n for n in NAMES if ".mlp." in n), 4, 8.0))
    batch = microbatches()[0]
    chunks[0](batch["tokens"], batch["position_ids"], None, labels=batch["labels"]).sum().backward()
    assert len(adapters_of(chunks)) == 4
    assert all(bool(x.linear_out.grad.any()) for x in adapters_of(chunks).values())


def test_adapters_of_quantized_outputs_are_refused(world):
    from mqat.checkpoints.pretrained import load_pretrained_
    from mqat.checkpoints.random_weights import RandomWeights
    from mqat.parallel.add_adapters import add_adapters_
    from mqat.specs.model import build_model
    from mqat.specs.policy import Rule

    cache = {"output": {"format": "int8_full", "granularity": "tensor"}}
    layers = Policy("null", rules=(Rule("*.linear_qkv", operands=cache),)).schemes(MODEL)
    chunks = build_model(MODEL, ModelConfig(), layers, torch.float32)
    load_pretrained_(chunks, RandomWeights(MODEL, 1, 0.1))
    with pytest.raises(UserError, match="linear_qkv: its output is quantized"):
        add_adapters_(chunks, Adapters(NAMES, 4, 8.0))

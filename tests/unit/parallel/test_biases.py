"""Quantized linears add their biases in every mode, and rescaling inputs takes biases along."""

from dataclasses import replace

import pytest
import torch

from mqat.checkpoints.random_weights import RandomWeights
from mqat.models.structure import DENSE_LINEARS
from mqat.specs.policy import Policy
from tests.unit.model_fixtures import MODEL, microbatches

LINEARS = tuple(linear.name for linear in DENSE_LINEARS)

BIASED = replace(MODEL, biases=LINEARS)


@pytest.fixture
def chunks(world):
    """`chunks("int8")`: a calibrated tiny model with a bias on every linear."""
    from megatron.core import parallel_state

    from mqat.calibration.calibrate import calibrate
    from mqat.checkpoints.pretrained import load_pretrained_
    from mqat.config import ModelConfig
    from mqat.evaluation.forward import evaluate
    from mqat.specs.model import build_model

    def make(algorithm):
        layers = Policy(algorithm, group_size=32).schemes(BIASED)
        built = build_model(BIASED, ModelConfig(), layers, torch.float32)
        load_pretrained_(built, RandomWeights(BIASED, 1, 0.1))
        if layers:
            group = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
            calibrate(built, lambda: evaluate(built, [microbatches()]), group=group)
        return built

    return make


def lower(chunks):
    from mqat.parallel.pack_weights import pack_weights_

    pack_weights_(chunks)


def calibrating(chunks):
    from mqat.parallel.linear import quantized_linears

    for linear in quantized_linears(chunks).values():
        linear.begin_calibration()


def reference(chunks):
    from mqat.parallel.linear import quantized_linears

    for linear in quantized_linears(chunks).values():
        linear.is_reference = True


def nothing(chunks):
    pass


@pytest.mark.parametrize("enter", [nothing, reference, lower, calibrating])
@pytest.mark.parametrize("algorithm", ["int8", "int4", "fp8"])
@torch.no_grad()
def test_every_mode_adds_the_bias_once(algorithm, enter, chunks):
    from mqat.parallel.linear import quantized_linears

    model = chunks(algorithm)
    enter(model)
    for name, linear in quantized_linears(model).items():
        x = torch.randn(8, 2, linear.input_size, generator=torch.Generator().manual_seed(0))

        def whole(linear=linear, x=x):
            """What reaches the rest of the model: some biases are added by the caller."""
            output, later = linear(x)
            return output if later is None else output + later

        found, bias = whole(), linear.bias.clone()
        assert float(bias.abs().max()) > 0.05  # control: there is something to add
        linear.bias.zero_()
        without = whole()
        assert torch.allclose(found, without + bias, atol=1e-6), name
        assert linear._is_fast() == (enter is not reference)


@pytest.mark.parametrize("algorithm", ["null", "int8"])
def test_biases_train(algorithm, chunks):
    from mqat.training.step import forward_backward

    (model,) = chunks(algorithm)
    forward_backward([model], microbatches())
    biases = {name: p for name, p in model.named_parameters() if name.endswith(".bias")}
    assert len(biases) == 4 * MODEL.num_layers
    for name, parameter in biases.items():
        assert parameter.grad is not None and float(parameter.grad.abs().max()) > 0, name


@torch.no_grad()
def test_rescaling_inputs_does_not_change_the_function(chunks):
    from mqat.calibration.smoothing_pairs import find_smoothing_pairs
    from mqat.evaluation.forward import logits
    from mqat.parallel.linear import decoder_linears

    model = chunks("null")
    tokens = microbatches()[0]["tokens"]
    before = logits(model, tokens)
    pairs = find_smoothing_pairs(model, decoder_linears(model), BIASED)
    for name, pair in pairs.items():
        powers = torch.randint(-2, 3, (pair.linear.weight.shape[1],)).float().exp2()
        pair.fold_(pair.tied(powers))
        # Powers of two: values are divided exactly, so nothing is rounded.
        assert torch.equal(logits(model, tokens), before), name
    pair.before_bias.mul_(2)
    assert not torch.equal(logits(model, tokens), before)  # control: the bias has a part in it

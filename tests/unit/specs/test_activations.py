"""Activations are told apart by what they compute, whatever Megatron's function is called."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from megatron.core.activations import fast_gelu, quick_gelu, squared_relu
from transformers.activations import ACT2FN

from mqat.specs.activations import FUNCTIONS, find_activation
from mqat.verify.activations import ACTIVATIONS


@pytest.mark.parametrize(
    ("function", "is_fused", "name"),
    [
        (F.silu, False, "silu"), (F.gelu, True, "gelu_tanh"), (F.gelu, False, None),
        (fast_gelu, False, "gelu_tanh"), (squared_relu, False, "relu2"), (F.relu, False, None),
        (quick_gelu, False, None),
    ],
)  # fmt: skip
def test_megatrons_functions_are_known(function, is_fused, name):
    config = SimpleNamespace(activation_func=function, bias_activation_fusion=is_fused)
    assert find_activation(config) == name


@pytest.mark.parametrize(
    ("name", "of_transformers", "of_facts"),
    [
        ("silu", "silu", "silu"), ("gelu_tanh", "gelu_new", "gelu_tanh"),
        ("gelu_tanh", "gelu_pytorch_tanh", "gelu_tanh"), ("relu2", "relu2", "squared_relu"),
    ],
)  # fmt: skip
def test_training_transformers_and_verify_compute_the_same(name, of_transformers, of_facts):
    x = torch.linspace(-6, 6, 101)
    expected = ACT2FN[of_transformers](x)
    assert torch.allclose(FUNCTIONS[name](x), expected, atol=1e-6)
    assert torch.allclose(ACTIVATIONS[of_facts](x), expected, atol=1e-6)

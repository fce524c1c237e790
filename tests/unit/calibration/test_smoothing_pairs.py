"""Folding keeps the function of the model, whatever kind of norm is before a linear."""

from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from mqat.checkpoints.random_weights import RandomWeights
from mqat.models.decoder import DecoderConfig
from mqat.models.structure import DENSE_LINEARS, DENSE_NORMS, FC1, QKV, in_layer
from mqat.quant.algorithm import Recipe
from mqat.specs.policy import Policy
from tests.unit.model_fixtures import MODEL, microbatches


class ZeroCentredNorm(nn.Module):
    """As Megatron's and Transformer Engine's with `layernorm_zero_centered_gamma`."""

    zero_centered_gamma = True

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self.weight.shape, 1 + self.weight)


def randomized(norm: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for parameter in norm.parameters():
        parameter.data += torch.randn(parameter.shape, generator=generator) * 0.5
    return norm


NORMS = {
    "RMSNorm": lambda size: randomized(nn.RMSNorm(size)),
    "LayerNorm": lambda size: randomized(nn.LayerNorm(size)),
    "zero-centred": lambda size: randomized(ZeroCentredNorm(size)),
}


@pytest.fixture
def chunks(world):
    from mqat.checkpoints.pretrained import load_pretrained_
    from mqat.config import ModelConfig
    from mqat.specs.model import build_model

    built = build_model(MODEL, ModelConfig(), Policy("int8").schemes(MODEL), torch.float32)
    load_pretrained_(built, RandomWeights(MODEL, 1, 0.1))
    return built


NAMES = {in_layer(i, linear.name) for i in range(MODEL.num_layers) for linear in DENSE_LINEARS}


@pytest.mark.parametrize("kind", NORMS)
def test_folding_keeps_the_function_behind_every_kind_of_norm(chunks, kind):
    from mqat.calibration.smoothing_pairs import find_smoothing_pairs
    from mqat.evaluation.forward import evaluate

    for layer in chunks[0].decoder.layers:
        for norm in DENSE_NORMS:
            setattr(layer, norm.name, NORMS[kind](MODEL.hidden_size))
    before = evaluate(chunks, [microbatches()])[0]
    pairs = find_smoothing_pairs(chunks, NAMES, MODEL)
    assert list(pairs) == [in_layer(i, x.name) for i in range(2) for x in DENSE_LINEARS]
    generator = torch.Generator().manual_seed(1)
    for pair in pairs.values():
        width = pair.linear.weight.shape[1]
        pair.fold_(pair.tied(torch.randn(width, generator=generator).exp()))
    assert evaluate(chunks, [microbatches()])[0] == pytest.approx(before, rel=1e-5)
    next(iter(pairs.values())).linear.weight.data *= 2  # control
    assert evaluate(chunks, [microbatches()])[0] != pytest.approx(before, rel=1e-4)


def test_a_factor_is_rounded_once_where_norm_and_weight_differ_in_dtype(chunks):
    from mqat.calibration.smoothing_pairs import find_smoothing_pairs

    pair = find_smoothing_pairs(chunks, NAMES, MODEL)[in_layer(0, QKV.name)]
    weight = pair.linear.weight
    weight.data = torch.ones_like(weight, dtype=torch.bfloat16)
    pair.before.fill_(1.0)
    scale = torch.full((MODEL.hidden_size,), 1.3)  # not a number of bfloat16
    pair.fold_(scale)
    assert torch.equal(pair.before, 1 / weight[0].float())
    assert not torch.equal(pair.before, 1 / scale)  # control


def test_a_norm_that_does_not_know_it_is_zero_centred_is_refused_by_name(chunks):
    from mqat.calibration.smoothing_pairs import find_smoothing_pairs

    chunks[0].config.layernorm_zero_centered_gamma = True
    with pytest.raises(ValueError, match=f"{QKV.name}: layernorm_zero_centered_gamma .*RmsNorm"):
        find_smoothing_pairs(chunks, NAMES, MODEL)
    behind_linears = {name for name in NAMES if not name.endswith((QKV.name, FC1.name))}
    assert len(find_smoothing_pairs(chunks, behind_linears, MODEL)) == 4


@dataclass(frozen=True)
class ParallelBlocks(DecoderConfig):
    """A table in which attention and MLP read the same norm."""

    @property
    def linears(self):
        return tuple(replace(x, norm=QKV.norm) if x == FC1 else x for x in DENSE_LINEARS)


def test_linears_that_read_the_same_tensor_are_not_rescaled_apart():
    from mqat.calibration.check_recipes import check_recipes

    model, recipes = (
        ParallelBlocks(**MODEL.to_dict()),
        dict.fromkeys(NAMES, Recipe(smoothquant=True)),
    )
    with pytest.raises(ValueError, match=f"{QKV.name}: its input also feeds {FC1.name}"):
        check_recipes(recipes, dict.fromkeys(sorted(NAMES, reverse=True)), model)
    others = {name for name in NAMES if not name.endswith((QKV.name, FC1.name))}
    check_recipes(recipes, dict.fromkeys(others), model)

import dataclasses

import pytest
import torch

from mqat.checkpoints.random_weights import RandomWeights
from mqat.config import ModelConfig
from mqat.errors import UserError
from mqat.models.adapters import Adapters
from mqat.models.structure import DENSE_LINEARS, in_layer, is_in_layer
from mqat.specs.policy import Policy
from tests.unit.model_fixtures import MODEL, microbatches

NAMES = tuple(in_layer(i, x.name) for i in range(2) for x in DENSE_LINEARS)
ADAPTERS = Adapters(NAMES, 4, 8.0)


def build(algorithm, *, is_packed):
    from mqat.checkpoints.pretrained import load_pretrained_
    from mqat.parallel.add_adapters import add_adapters_
    from mqat.specs.model import build_model

    layers = Policy(algorithm, 64).schemes(MODEL)
    chunks = build_model(MODEL, ModelConfig(), layers, torch.float32, is_packed=is_packed)
    load_pretrained_(chunks, RandomWeights(MODEL, 1, 0.1))
    add_adapters_(chunks, ADAPTERS)
    return chunks, layers


@pytest.mark.parametrize("algorithm", ["nf4", "int4", "w_uint4_asym"])
def test_a_packed_backbone_computes_what_its_quantized_one_does(world, algorithm, tmp_path):
    from torch.distributed import group

    from mqat.calibration.calibrate import calibrate
    from mqat.checkpoints.dist_checkpoint import load_checkpoint, save_checkpoint
    from mqat.checkpoints.packed_backbone import load_packed_
    from mqat.checkpoints.reader import CheckpointReader
    from mqat.evaluation.forward import logits
    from mqat.parallel.linear import quantized_linears

    tokens = microbatches()[0]["tokens"]
    floats, layers = build(algorithm, is_packed=False)
    unquantized = logits(floats, tokens)
    calibrate(floats, lambda: None, group=group.WORLD)
    expected = logits(floats, tokens)
    chunks, _ = build(algorithm, is_packed=True)
    load_packed_(chunks, RandomWeights(MODEL, 1, 0.1))
    found = logits(chunks, tokens)
    # NF4's maxima are quantized a second time.
    near = 0.2 if algorithm == "nf4" else 1e-4
    assert (found - expected).norm() < near * (unquantized - expected).norm()
    weights = [
        x.weight.numel()
        for x in quantized_linears(chunks).values()
        if is_in_layer(x.quantized_name)
    ]
    assert set(weights) == {0}
    bits = 8 * sum(x.packed_weight.num_bytes for x in quantized_linears(chunks).values())
    bits /= sum(x.local_shape[0] * x.local_shape[1] for x in quantized_linears(chunks).values())
    assert bits < {"nf4": 4.3, "int4": 4.5, "w_uint4_asym": 5.0}[algorithm]

    save_checkpoint(tmp_path / "ckpt", chunks, model=MODEL, layers=layers, algorithm=algorithm,
                    adapters=ADAPTERS)  # fmt: skip
    reader = CheckpointReader(tmp_path / "ckpt")
    assert reader.is_packed and not reader.has(MODEL.linear(DENSE_LINEARS[0].name).key)
    again, _ = build(algorithm, is_packed=True)
    load_checkpoint(tmp_path / "ckpt", again, layers=layers, adapters=ADAPTERS)
    assert torch.equal(logits(again, tokens), found)
    with pytest.raises(UserError, match="packed, and a model in floats cannot be made"):
        load_checkpoint(tmp_path / "ckpt", floats, layers=layers, adapters=ADAPTERS)


def test_a_calibrated_awq_checkpoint_is_packed_with_its_own_scales(world, tmp_path):
    """Calibrate, pack, save, and load again: ModelOpt's INT4_AWQ_REAL_QUANT_CFG."""
    from torch.distributed import group

    from mqat.calibration.calibrate import calibrate
    from mqat.calibration.weight_recipe import apply_weight_recipe_
    from mqat.checkpoints.dist_checkpoint import load_checkpoint, save_checkpoint
    from mqat.checkpoints.pretrained import load_pretrained_
    from mqat.evaluation.forward import evaluate, logits
    from mqat.parallel.add_adapters import add_adapters_
    from mqat.specs.model import build_model

    policy, tokens = Policy("int4_awq", 64), microbatches()[0]["tokens"]
    layers = policy.schemes(MODEL)
    recipes = {name: algorithm.recipe for name, algorithm in policy.resolve(MODEL).items()}
    floats = build_model(MODEL, ModelConfig(), layers, torch.float32)
    load_pretrained_(floats, RandomWeights(MODEL, 1, 0.1))

    def run():
        evaluate(floats, [microbatches()])

    qparams, _ = apply_weight_recipe_(
        floats, run, recipes, model=MODEL, group=group.WORLD, dp_group=group.WORLD,
    )  # fmt: skip
    calibrate(floats, run, group=group.WORLD, weight_qparams=qparams)
    expected = logits(floats, tokens)
    save_checkpoint(tmp_path / "ptq", floats, model=MODEL, layers=layers, algorithm="int4_awq")

    def packed(path):
        chunks = build_model(MODEL, ModelConfig(), layers, torch.float32, is_packed=True)
        add_adapters_(chunks, ADAPTERS)
        load_checkpoint(path, chunks, layers=layers, adapters=ADAPTERS)
        return chunks

    chunks = packed(tmp_path / "ptq")
    found = logits(chunks, tokens)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    save_checkpoint(tmp_path / "ckpt", chunks, model=MODEL, layers=layers, algorithm="int4_awq",
                    adapters=ADAPTERS)  # fmt: skip
    assert torch.equal(logits(packed(tmp_path / "ckpt"), tokens), found)
    calibrate(floats, run, group=group.WORLD)  # control: the recipe's weights, by plain maxima
    assert (logits(floats, tokens) - expected).abs().max() > 1e-2


def test_gradients_reach_adapters_through_packed_weights(world):
    from mqat.checkpoints.packed_backbone import load_packed_
    from mqat.parallel.add_adapters import adapters_of

    chunks, _ = build("nf4", is_packed=True)
    load_packed_(chunks, RandomWeights(MODEL, 1, 0.1))
    batch = microbatches()[0]
    chunks[0](batch["tokens"], batch["position_ids"], None, labels=batch["labels"]).sum().backward()
    assert all(bool(x.linear_out.grad.any()) for x in adapters_of(chunks).values())
    trained = {name for name, x in chunks[0].named_parameters() if x.grad is not None}
    assert len(trained) == 2 * len(NAMES)


def test_units_are_those_of_every_layout():
    from mqat.parallel.layout import packed_units

    scheme = Policy("nf4").schemes(MODEL)[NAMES[0]].weight
    wide = dataclasses.replace(MODEL, hidden_size=256, intermediate_size=512)
    for linear in DENSE_LINEARS:
        count, unit, axis = packed_units(wide, linear, scheme)
        whole = linear.shape(wide)
        assert unit[axis] * count == whole[axis] and unit[1 - axis] == whole[1 - axis]
        assert unit[1] % 64 == 0

"""Quantized vocabulary tables inside a real Megatron model of one process."""

from dataclasses import replace

import pytest
import torch

from mqat.checkpoints.random_weights import RandomWeights
from mqat.quant.algorithm import named_scheme
from mqat.quant.granularity import PerGroup
from mqat.quant.qparams import statistic_of
from mqat.quant.scheme import LinearScheme, TensorScheme
from mqat.specs.policy import Policy, Rule
from tests.unit.model_fixtures import MODEL, microbatches, switch_off

UNTIED = replace(MODEL, tie_word_embeddings=False)
RULES = (
    Rule("embedding.word_embeddings", "w_uint4_asym"),
    Rule("output_layer", operands={"weight": {"format": "int4", "granularity": "channel"}}),
)


@pytest.fixture
def lookup(world):
    """`lookup(rows, scheme)`: a table of these rows."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    from mqat.parallel.embedding import QuantVocabParallelEmbedding

    def make(rows, scheme):
        config = TransformerConfig(num_layers=1, hidden_size=4, num_attention_heads=1)
        table = QuantVocabParallelEmbedding(
            *rows.shape,
            init_method=torch.nn.init.normal_,
            config=config,
            quantized_name="x",
            scheme=scheme,
        )
        table.weight.data.copy_(rows)
        return table

    return make


ROWS = torch.tensor([[7.0, -0.6, 3.4, 0.0], [0.0, 0.0, 0.0, 0.0], [0.7, 0.04, -0.06, 0.5]])


def test_rows_have_their_own_steps(lookup):
    table = lookup(ROWS, LinearScheme("x", named_scheme("int4").weight, None))
    table.weight_quantizer.freeze_(statistic_of(table.weight, table.weight_quantizer.scheme))
    ids = torch.tensor([[0, 2, 0, 1]])
    out = table(ids)
    step = table.weight_quantizer.scale[2].item()
    assert step >= 0.1 and step == pytest.approx(0.1, rel=2**-7)  # rounded up to bfloat16
    expected = [[7, -1, 3, 0], [7 * step, 0, -step, 5 * step], [7, -1, 3, 0], [0, 0, 0, 0]]
    torch.testing.assert_close(out[0], torch.tensor(expected))
    table.begin_calibration()
    assert torch.equal(table(ids)[0], ROWS[ids[0]])
    table.end_calibration()
    table.weight_quantizer.is_enabled = False
    assert torch.equal(table(ids)[0], ROWS[ids[0]])


def test_gradients_reach_the_looked_up_rows_where_nothing_is_clipped(lookup):
    scheme = TensorScheme(named_scheme("int4").weight.format, PerGroup(2))
    table = lookup(ROWS, LinearScheme("x", scheme, None))
    table.weight_quantizer.freeze_(torch.tensor([[7.0, 0.7], [1.0, 1.0], [7.0, 7.0]]))
    table(torch.tensor([[0, 0, 2]])).sum().backward()
    # Row 0: twice; 3.4 is clipped at -0.8..0.7. Row 1 was not looked up.
    assert table.weight.grad.tolist() == [[2, 2, 0, 2], [0, 0, 0, 0], [1, 1, 1, 1]]


@pytest.fixture
def chunks(world):
    from megatron.core import parallel_state

    from mqat.calibration.calibrate import calibrate
    from mqat.checkpoints.pretrained import load_pretrained_
    from mqat.config import ModelConfig
    from mqat.evaluation.forward import evaluate
    from mqat.specs.model import build_model
    from mqat.training.optimizer import wrap_for_training

    layers = Policy("null", 32, RULES).schemes(UNTIED)
    chunks = build_model(UNTIED, ModelConfig(), layers, torch.float32)
    load_pretrained_(chunks, RandomWeights(UNTIED, 1, 0.1))
    chunks = wrap_for_training(chunks)
    group = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
    calibrate(chunks, lambda: evaluate(chunks, [microbatches()]), group=group)
    return chunks


def test_both_tables_are_on_their_grids_and_train(chunks):
    from mqat.config import OptimizerConfig
    from mqat.evaluation.forward import evaluate
    from mqat.parallel.quantized_module import quantized_modules
    from mqat.training.optimizer import build_optimizer
    from mqat.training.step import forward_backward

    modules = quantized_modules(chunks)
    embedding, head = (modules[rule.pattern] for rule in RULES)
    ids = torch.arange(UNTIED.vocab_size)[None]

    def most_levels():
        with torch.no_grad():
            rows = embedding(ids)[0].reshape(-1, 32)
            columns = head(torch.eye(UNTIED.hidden_size)[:, None])[0][:, 0].t()
        return [max(row.unique().numel() for row in matrix) for matrix in (rows, columns)]

    assert max(most_levels()) <= 16
    optimizer, _ = build_optimizer(chunks, OptimizerConfig(lr=1e-3), max_steps=5, clip_grad=1.0)
    before, tables = (
        evaluate(chunks, [microbatches()]),
        [x.weight.clone() for x in (embedding, head)],
    )
    for _ in range(2):
        chunks[0].zero_grad_buffer()
        optimizer.zero_grad()
        forward_backward(chunks, microbatches())
        optimizer.step()
    assert evaluate(chunks, [microbatches()])[0] < before[0]
    assert all(not torch.equal(x.weight, t) for x, t in zip((embedding, head), tables, strict=True))
    assert max(most_levels()) <= 16
    switch_off(chunks)
    assert min(most_levels()) > 16  # control


def test_recipes_leave_tables_alone(chunks):
    from megatron.core import parallel_state

    from mqat.calibration.weight_recipe import apply_weight_recipe_
    from mqat.evaluation.forward import evaluate
    from mqat.parallel.linear import quantized_linears
    from mqat.quant.algorithm import Recipe

    recipes = dict.fromkeys(quantized_linears(chunks), Recipe(smoothquant=True))
    qparams, _ = apply_weight_recipe_(
        chunks, lambda: evaluate(chunks, [microbatches()]), recipes,
        model=UNTIED,
        group=parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True),
        dp_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
    )  # fmt: skip
    assert not qparams

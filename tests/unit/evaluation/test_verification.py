"""An export is judged beside the model it came from; a rebuilt model beside what training recorded."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from mqat.export.export import export_hf, export_trtllm
from mqat.parallel.quantized_module import unwrapped
from mqat.specs.policy import Policy
from tests.distributed.worker import EXPERTS
from tests.unit.model_fixtures import MODEL

TOKENS = torch.randint(0, 301, (2, 24), generator=torch.Generator().manual_seed(3))


def saved(chunks, algorithm, path, *, records=True, model=MODEL):
    from mqat.checkpoints.dist_checkpoint import save_checkpoint
    from mqat.evaluation.verification import record_logits

    layers = Policy(algorithm, group_size=64).schemes(model)
    recorded = record_logits(chunks, model) if records else None
    save_checkpoint(
        path, chunks, model=model, layers=layers, algorithm=algorithm, recorded=recorded
    )
    return path


def rebuilt(path):
    """As `mqat verify` does, in process groups that exist."""
    from mqat.checkpoints.dist_checkpoint import checkpoint_layers, load_checkpoint
    from mqat.checkpoints.manifest import read_description
    from mqat.config import ModelConfig
    from mqat.specs.model import build_model

    layers = checkpoint_layers(read_description(path))
    chunks = build_model(MODEL, ModelConfig(), layers, torch.float32)
    load_checkpoint(path, chunks, layers=layers)
    return [chunk.eval() for chunk in chunks]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("algorithm", ["null", "int8", "fp8", "int8_pc_pt"])
def test_a_faithful_export_is_near_in_every_linear_layer_and_logit(
    algorithm, dtype, calibrated, tmp_path
):
    from mqat.evaluation.verification import verify_with_model

    chunks = calibrated(algorithm, dtype)
    checkpoint = saved(chunks, algorithm, tmp_path / "c")
    out = tmp_path / "out"
    if algorithm == "int8_pc_pt":
        export_hf(checkpoint, out)
    else:
        export_trtllm(checkpoint, out, tensor_parallel=2)
    report = verify_with_model(out, checkpoint, chunks, TOKENS, "bfloat16", is_rebuilt=False)
    assert report.problems == []
    is_exact = dtype == torch.float32
    assert report.worst_linear < (1e-5 if is_exact else 1e-2)
    assert report.worst_layer < (1e-2 if is_exact else 0.25)
    said = "\n".join(report.lines())
    for part in (
        f"made from {checkpoint}", "linears within", f"logits: of {TOKENS.numel()} positions",
        "against itself", "not compared: tokenizer files",
    ):  # fmt: skip
        assert part in said
    assert f"equal to the checkpoint {checkpoint}" in report.headline()


def test_an_export_of_a_model_that_was_never_calibrated_is_near(world, tmp_path):
    from mqat.checkpoints.pretrained import load_pretrained_
    from mqat.checkpoints.random_weights import RandomWeights
    from mqat.config import ModelConfig
    from mqat.evaluation.verification import verify_with_model
    from mqat.specs.model import build_model

    chunks = build_model(MODEL, ModelConfig(), Policy("int8").schemes(MODEL), torch.float32)
    load_pretrained_(chunks, RandomWeights(MODEL, 1, 0.2))
    checkpoint = saved(chunks, "int8", tmp_path / "c")
    export_hf(checkpoint, tmp_path / "out")

    def worst(dtype):
        return verify_with_model(
            tmp_path / "out", checkpoint, chunks, TOKENS, dtype, is_rebuilt=False
        ).worst_linear

    assert worst("bfloat16") < 1e-5 < worst("float32")  # control: weights that are not rounded


def test_what_ranks_round_otherwise_is_allowed_where_it_is_described(calibrated, tmp_path):
    from mqat.evaluation.verification import verify_with_model

    chunks = calibrated("fp8_pc_pt")
    checkpoint = saved(chunks, "fp8_pc_pt", tmp_path / "c")
    export_trtllm(checkpoint, tmp_path / "out", tensor_parallel=2)
    report = verify_with_model(
        tmp_path / "out", checkpoint, chunks, TOKENS, "bfloat16", is_rebuilt=False
    )
    assert report.problems == [] and report.worst_linear < 1e-5 and report.worst_layer > 1e-4


@pytest.mark.filterwarnings("ignore:.*input scale")
def test_experts_that_share_a_step_are_compared_with_a_trainer_that_does(
    calibrated, tmp_path, monkeypatch
):
    from mqat.evaluation import verification
    from mqat.parallel.linear import quantized_linears

    model = replace(EXPERTS, expert_intermediate_size=128)
    chunks = calibrated("fp8", model=model)
    checkpoint = saved(chunks, "fp8", tmp_path / "c", model=model)
    export_trtllm(checkpoint, tmp_path / "out", tensor_parallel=2)
    own = {n: x.input_quantizer.scale.clone() for n, x in quantized_linears(chunks).items()}

    def verified():
        return verification.verify_with_model(
            tmp_path / "out", checkpoint, chunks, TOKENS, "bfloat16", is_rebuilt=False
        )

    report = verified()
    assert report.problems == [] and report.worst_layer < 1e-2 and report.noise < 1e-3
    for name, linear in quantized_linears(chunks).items():
        assert torch.equal(linear.input_quantizer.scale, own[name])
    monkeypatch.setattr(verification, "shared_steps", lambda *_: nullcontext())
    assert any("adds something else" in problem for problem in verified().problems)  # control


def _wrong_rotation(patch):
    from mqat.verify.positions import Positions

    rotate = Positions.rotate
    patch.setattr(
        Positions, "rotate", lambda self, *args: rotate(replace(self, base=2 * self.base), *args)
    )


def _wrong_activation(patch):
    from mqat.verify.activations import ACTIVATIONS

    patch.setitem(ACTIVATIONS, "silu", torch.nn.functional.gelu)


def _wrong_mask(patch):
    from mqat.verify.positions import Positions

    attention = torch.nn.functional.scaled_dot_product_attention
    patch.setattr(Positions, "attend", lambda self, q, k, v, layer: attention(q, k, v))


@pytest.mark.parametrize("wrong", [_wrong_rotation, _wrong_activation, _wrong_mask])
def test_right_tensors_that_a_layer_computes_wrongly_with_are_found(
    wrong, calibrated, tmp_path, monkeypatch
):
    """What no comparison of tensors, and of linears one by one, can see."""
    from mqat.evaluation.verification import verify_with_model
    from mqat.verify.decoder import Decoder

    chunks = calibrated("int8")
    checkpoint = saved(chunks, "int8", tmp_path / "c")
    export_trtllm(checkpoint, tmp_path / "out", tensor_parallel=1)
    right = Decoder.layer

    def layer(self, number, x):
        with pytest.MonkeyPatch.context() as patch:
            wrong(patch)
            return right(self, number, x)

    monkeypatch.setattr(Decoder, "layer", layer)
    report = verify_with_model(
        tmp_path / "out", checkpoint, chunks, TOKENS, "bfloat16", is_rebuilt=False
    )
    assert any("own input it adds something else" in p for p in report.problems), report
    assert report.worst_linear < 1e-5  # the linears are right


def test_recorded_logits_tell_whether_the_rebuilt_model_is_the_trained_one(calibrated, tmp_path):
    from mqat.evaluation.verification import verify_with_model

    checkpoint = saved(calibrated("int8"), "int8", tmp_path / "c")
    export_trtllm(checkpoint, tmp_path / "out", tensor_parallel=1)
    chunks = rebuilt(checkpoint)

    def verified():
        return verify_with_model(
            tmp_path / "out", checkpoint, chunks, TOKENS, "bfloat16", is_rebuilt=True
        )

    report = verified()
    assert report.problems == [] and any(
        "logits that training recorded: KL" in s for s in report.lines()
    )
    # A model that computes something else than its description says, in a way no check of it sees.
    rotary = chunks[0].rotary_pos_emb
    rotary.model = replace(rotary.model, rope_theta=2 * rotary.model.rope_theta)
    chunks[0].rotary_pos_emb.forward.cache_clear()
    (first, *_) = verified().problems
    assert "rebuilt from mqat.json it computes other logits than training recorded" in first


def test_a_checkpoint_without_recorded_logits_is_said_and_accepted(calibrated, tmp_path):
    from mqat.evaluation.verification import verify_with_model

    chunks = calibrated("int8")
    checkpoint = saved(chunks, "int8", tmp_path / "c", records=False)
    export_trtllm(checkpoint, tmp_path / "out", tensor_parallel=1)
    report = verify_with_model(
        tmp_path / "out", checkpoint, chunks, TOKENS, "bfloat16", is_rebuilt=True
    )
    assert report.ok and any("no logits were recorded" in line for line in report.lines())


def test_dropout_of_a_training_loop_does_not_reach_what_is_recorded(calibrated):
    from mqat.evaluation.verification import record_logits

    chunks = calibrated("int8")
    layers = [layer for chunk in unwrapped(chunks) for layer in chunk.decoder.layers]
    for layer in layers:
        layer.hidden_dropout = 0.5
    chunks[0].train()
    first, second = record_logits(chunks), record_logits(chunks)
    assert torch.equal(first.logits, second.logits)
    assert chunks[0].training and layers[0].hidden_dropout == 0.5


def test_logits_of_another_vocabulary_are_not_saved_beside_a_model(calibrated, tmp_path):
    from mqat.checkpoints.dist_checkpoint import save_checkpoint
    from mqat.evaluation.verification import record_logits

    chunks = calibrated("null")
    assert unwrapped(chunks)[0].vocab_size > 301  # padded
    recorded = record_logits(chunks, MODEL)
    assert recorded.logits.shape[-1] == 301 and recorded.tokens.max() < 301
    other = record_logits(chunks, replace(MODEL, vocab_size=300))
    with pytest.raises(ValueError, match=r"logits are of 300 tokens, the model of 301"):
        save_checkpoint(
            tmp_path / "c", chunks, model=MODEL, layers={}, algorithm=None, recorded=other
        )


def test_a_fault_of_the_judge_is_raised_and_not_lost_in_a_hook(calibrated, tmp_path, monkeypatch):
    from mqat.evaluation.verification import verify_with_model
    from mqat.verify.layers import LayerComparison

    chunks = calibrated("int8")
    checkpoint = saved(chunks, "int8", tmp_path / "c")
    export_trtllm(checkpoint, tmp_path / "out", tensor_parallel=1)

    def fails(self, *args):
        raise ZeroDivisionError("of the judge")

    monkeypatch.setattr(LayerComparison, "__call__", fails)
    with pytest.raises(ZeroDivisionError, match="of the judge"):
        verify_with_model(
            tmp_path / "out", checkpoint, chunks, TOKENS, "bfloat16", is_rebuilt=False
        )


@pytest.mark.parametrize("algorithm", ["null", "int8"])
def test_biases_are_compared_as_they_are_served(algorithm, calibrated, tmp_path):
    from mqat.evaluation.verification import verify_with_model

    model = replace(MODEL, family="qwen2", biases=("self_attention.linear_qkv",))
    chunks = calibrated(algorithm, model=model)
    for name, parameter in unwrapped(chunks)[0].named_parameters():
        if name.endswith("bias"):
            parameter.data.uniform_(0.5, 3.0)  # far above the products, and no bfloat16 numbers
    checkpoint = saved(chunks, algorithm, tmp_path / "c", model=model)
    export_trtllm(checkpoint, tmp_path / "out", tensor_parallel=1)
    report = verify_with_model(
        tmp_path / "out", checkpoint, chunks, TOKENS, "bfloat16", is_rebuilt=False
    )
    assert report.problems == [] and report.worst_linear < 1e-5


def test_nothing_is_recorded_while_a_schedule_has_quantizers_off(calibrated):
    from mqat.evaluation.verification import record_logits
    from tests.unit.model_fixtures import switch_off

    chunks = calibrated("int8")
    found = record_logits(chunks)
    assert found.logits.shape == (1, 16, 301) and found.tokens.shape == (1, 64)
    switch_off(chunks)
    assert record_logits(chunks) is None


def test_schemes_that_are_not_the_models_are_not_saved(calibrated, tmp_path):
    from mqat.checkpoints.dist_checkpoint import save_checkpoint

    chunks = calibrated("int8")
    layers = Policy("int8", group_size=64).schemes(MODEL)
    missing = layers.pop("decoder.layers.1.mlp.linear_fc2")
    with pytest.raises(
        ValueError, match=r"1\.mlp\.linear_fc2 is quantized in the model and not in"
    ):
        save_checkpoint(tmp_path / "c", chunks, model=MODEL, layers=layers, algorithm="int8")
    assert missing is not None and not (tmp_path / "c").exists()


def test_one_layer_spec_for_all_layers_is_refused(calibrated):
    from mqat.parallel.quantized_module import quantized_modules

    chunks = calibrated("int8")
    modules = quantized_modules(chunks)
    modules["decoder.layers.1.mlp.linear_fc2"].quantized_name = "decoder.layers.0.mlp.linear_fc2"
    with pytest.raises(ValueError, match=r"two modules are called decoder\.layers\.0.*linear_fc2"):
        quantized_modules(chunks)

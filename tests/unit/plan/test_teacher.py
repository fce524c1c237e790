"""Teachers that cannot teach are refused before anything is loaded."""

from dataclasses import replace

import pytest

from mqat.config import load_config
from mqat.data.packaged import python_docs_documents
from mqat.data.tokenizer import train_small_tokenizer
from mqat.models.adapters import Adapters
from mqat.plan.run import make_plan, memory_estimate
from mqat.plan.teacher import check_same_tokens
from tests.unit.export.checkpoints import TINY, UNTIED, describe, write_checkpoint

DISTILL = "quantization.distill"


@pytest.fixture
def plan(tmp_path):
    """`plan(model, *keys)`: of the tiny model, taught by a checkpoint of `model` if there is one."""

    def make(teacher, *keys):
        student = tmp_path / "student"
        if not student.exists():
            write_checkpoint(student, TINY, {})
        named = []
        if teacher is not None:
            write_checkpoint(tmp_path / "teacher", teacher, {})
            named = [f"{DISTILL}.teacher={tmp_path / 'teacher'}"]
        settings = [
            f"model.restore_from_path={student}", "model.data.packaged=python_docs",
            "model.data.seq_length=32", "model.global_batch_size=2", "export.format=null", *named, *keys,
        ]  # fmt: skip
        return make_plan(load_config(None, settings), world_size=2)

    return make


def test_a_teacher_of_another_shape_is_taken(plan):
    larger = replace(TINY, intermediate_size=3 * TINY.intermediate_size)
    model, _ = plan(larger).teacher
    assert model.intermediate_size == larger.intermediate_size
    found = memory_estimate(plan(None, f"{DISTILL}.weight=0.5"))
    assert "teacher's weights per rank" in found
    assert "teacher's weights per rank" not in memory_estimate(plan(None))


@pytest.mark.parametrize(
    ("changes", "keys", "message"),
    [
        ({"vocab_size": 300}, [], "its vocabulary tables have 300 rows, the student's"),
        ({"hidden_size": 512}, [f"{DISTILL}.hidden_weight=1"], "hidden states have 512 channels"),
        ({"max_position_embeddings": 16}, [], "exceeds its max_position_embeddings=16"),
        ({"num_layers": 3}, ["model.pipeline_model_parallel_size=2"], "num_layers=3"),
    ],
)
def test_what_does_not_fit_is_named(plan, changes, keys, message):
    with pytest.raises(ValueError, match=message):
        plan(replace(UNTIED, **changes), *keys)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ([f"{DISTILL}.teacher=nowhere"], r"distill\.teacher=nowhere: no such file"),
        ([f"{DISTILL}.teacher=''"], r"distill\.teacher=: no such file"),
        ([f"{DISTILL}.top_k=9999"], r"top_k=9999 exceeds the vocabulary's"),
        ([f"{DISTILL}.top_k=1"], r"top_k=1 must be null, or at least 2"),
        ([f"{DISTILL}.temperature=0"], r"temperature=0\.0 must be a number above 0"),
        ([f"{DISTILL}.weight=0"], r"weight=0\.0 must be a number in \(0, 1\]"),
        ([f"{DISTILL}.hidden_weight=-1"], r"hidden_weight=-1\.0 must be"),
        ([f"{DISTILL}.divergence=kl"], r"divergence=kl must be forward_kl or reverse_kl"),
        ([f"{DISTILL}.techer=x"], r"unknown key 'quantization\.distill\.techer'.*teacher"),
        ([f"{DISTILL}=true"], r"quantization\.distill=True is a section, not a value"),
        (
            [f"{DISTILL}.weight=1", "quantization.fake_quant_after_n_steps=5"],
            "student and teacher are the same function",
        ),
    ],
)
def test_wrong_keys_are_named(plan, keys, message):
    with pytest.raises(ValueError, match=message):
        plan(None, *keys)


def test_a_quantized_checkpoint_teaches_nobody(plan, tiny):
    with pytest.raises(ValueError, match="holds a quantized model"):
        plan(None, f"{DISTILL}.teacher={tiny('int8')}")


def test_other_tokens_are_named(tmp_path):
    first, second = (
        train_small_tokenizer(python_docs_documents()[part], 300)
        for part in (slice(2), slice(4, 6))
    )
    second.save_pretrained(tmp_path / "tokenizer")
    check_same_tokens(tmp_path, second.get_vocab())  # control
    with pytest.raises(ValueError, match="tokens other numbers than the student's, such as"):
        check_same_tokens(tmp_path, first.get_vocab())


@pytest.mark.parametrize("recipe", ["run_sft", "run_ptq"])
def test_only_qat_has_a_teacher(recipe):
    from mqat.training import recipes

    with pytest.raises(ValueError, match="only QAT has a teacher"):
        getattr(recipes, recipe)(load_config(None, [f"{DISTILL}.weight=0.5"]))


def test_weights_without_their_adapters_are_no_teacher(plan, tmp_path):
    plain = ["quantization.algorithm=int8_wo"]  # others are refused as soon as there are adapters
    assert plan(UNTIED) and plan(None, *plain, f"{DISTILL}.weight=0.5")  # control: there are none
    adapters = Adapters(("decoder.layers.0.mlp.linear_fc1",), 4, 4.0).to_dict()
    describe(tmp_path / "teacher", adapters=adapters)
    with pytest.raises(ValueError, match=r"teacher=.*/teacher: has adapters, without which"):
        plan(None, f"{DISTILL}.teacher={tmp_path / 'teacher'}")
    describe(tmp_path / "student", adapters=adapters)
    plan(None, *plain)
    with pytest.raises(ValueError, match=r"teacher=null, but .*/student has adapters"):
        plan(None, *plain, f"{DISTILL}.weight=0.5")

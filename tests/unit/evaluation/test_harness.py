"""Evaluation tasks: what lm-evaluation-harness's own Hugging Face backend finds, and what is refused."""

from __future__ import annotations

import importlib.util
import json
from pydoc_data import topics

import pytest

from mqat.checkpoints.huggingface import HuggingFaceCheckpoint
from mqat.checkpoints.pretrained import load_pretrained_
from mqat.config import ModelConfig
from mqat.data.tokenizer import load_tokenizer, save_tokenizer, train_small_tokenizer
from mqat.errors import UserError
from mqat.evaluation.harness import Tasks, add_to_summary, evaluate_tasks, table
from mqat.evaluation.text_model import MegatronText
from mqat.specs.model import build_model
from tests.unit.checkpoints.test_positions import transformers_model
from tests.unit.evaluation.task_files import mmlu_questions, write_tasks

IS_HERE = importlib.util.find_spec("lm_eval") is not None
needs_harness = pytest.mark.skipif(not IS_HERE, reason="lm-eval is not installed (mqat[eval])")
TEXTS = [text[:n] for text, n in zip(topics.topics.values(), (900, 40, 300), strict=False)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model of transformers with a tokenizer, and task files."""
    path = tmp_path_factory.mktemp("model")
    tokenizer = train_small_tokenizer(list(topics.topics.values())[:20], 300)
    transformers_model("llama3", vocab_size=300).save_pretrained(path)
    save_tokenizer(tokenizer, path)
    (path / "tasks").mkdir()
    return path


@pytest.fixture
def model(world, folder):
    import torch

    source = HuggingFaceCheckpoint(folder)
    chunks = build_model(source.config, ModelConfig(), {}, torch.float32)
    load_pretrained_(chunks, source)
    return MegatronText(chunks, load_tokenizer(folder))


@needs_harness
def test_metrics_are_those_of_its_own_backend_for_models_of_transformers(model, folder):
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM

    names = write_tasks(folder / "tasks", TEXTS, mmlu_questions(6))
    tasks = Tasks(names, folder / "tasks")
    found = evaluate_tasks(model, tasks, batch_size=3)
    own = HFLM(
        AutoModelForCausalLM.from_pretrained(folder), tokenizer=load_tokenizer(folder),
        batch_size=1, max_length=64,
    )  # fmt: skip
    expected = lm_eval.simple_evaluate(
        own, tasks=names, task_manager=tasks.manager, bootstrap_iters=0
    )["results"]
    for name in names:
        for metric, value in expected[name].items():
            if isinstance(value, float):
                mine = found["tasks"][name][metric.removesuffix(",none")]
                assert mine == pytest.approx(value, rel=1e-4), (name, metric)
    assert (
        found["samples"]["local_texts"] == 3
        and found["tasks"]["local_texts"]["word_perplexity"] > 1
    )
    shorter = evaluate_tasks(model, Tasks(["local_texts"], folder / "tasks"), seq_length=16)
    assert shorter["tasks"]["local_texts"] != found["tasks"]["local_texts"]  # control
    assert "word_perplexity" in table(found)
    with pytest.raises(UserError, match="at most 64 tokens"):
        evaluate_tasks(model, tasks, seq_length=65)


@needs_harness
def test_unknown_tasks_and_missing_data_are_refused(tmp_path, monkeypatch):
    import datasets

    with pytest.raises(UserError, match=r"'winogrand' is unknown; did you mean .*'winogrande'"):
        Tasks(["winogrand"])
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    write_tasks(tmp_path, TEXTS, mmlu_questions(2))
    (tmp_path / "local_texts.jsonl").unlink()
    with pytest.raises(UserError, match=r"local_texts cannot be loaded .*bring the cache"):
        Tasks(["local_texts"], tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        Tasks(["local_texts"], tmp_path / "nowhere")


@pytest.mark.skipif(IS_HERE, reason="lm-eval is installed")
def test_tasks_without_the_package_are_refused():
    with pytest.raises(UserError, match=r"install mqat\[eval\]"):
        Tasks(["wikitext"])


def test_metrics_go_into_the_summary_of_the_run_that_holds_the_model(tmp_path):
    model = tmp_path / "run" / "checkpoints" / "ptq"
    model.mkdir(parents=True)
    found = {"tasks": {"wikitext": {"word_perplexity": 30.5}}}
    assert add_to_summary(model, found) is None
    summary = tmp_path / "run" / "summary.json"
    summary.write_text('{"ppl": {"bf16": 2.0}}')
    assert add_to_summary(model, found) is None  # somebody else's file
    (tmp_path / "run" / "config.yaml").write_text("{}")
    assert add_to_summary(model, found) == summary
    assert add_to_summary(model, {"tasks": {"mmlu": {"acc": 0.3}}}) == summary
    assert json.loads(summary.read_text()) == {
        "ppl": {"bf16": 2.0},
        "tasks": {"checkpoints/ptq": {"wikitext": {"word_perplexity": 30.5}, "mmlu": {"acc": 0.3}}},
    }

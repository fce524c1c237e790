"""The text that `mqat verify` runs where none is given."""

import pytest
import torch

from mqat.data.sample import NUM_TOKENS, sample_tokens


def test_tokens_are_the_texts_and_fit_the_model(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    tokens = sample_tokens(tmp_path, vocab_size=len(tokenizer), longest=4096)
    assert tokens.shape == (1, NUM_TOKENS)
    assert tokenizer.decode(tokens[0]).startswith("The lighthouse stands at the end")
    short = sample_tokens(tmp_path, vocab_size=len(tokenizer), longest=16)
    assert torch.equal(short, tokens[:, :16])
    with pytest.raises(ValueError, match=r"tokenizer has 600 entries, the model's vocabulary 100"):
        sample_tokens(tmp_path, vocab_size=100, longest=16)


def test_without_a_tokenizer_ids_are_spread(tmp_path):
    tokens = sample_tokens(tmp_path, vocab_size=301, longest=64)
    assert tokens.shape == (1, 64) and len(set(tokens[0].tolist())) == 64

"""Perplexity of a text: which tokens are predicted, and which are left out."""

import math

import pytest
import torch

from mqat.data.packing import pack_text
from mqat.evaluation.perplexity import Perplexity, _perplexity


class Letters:
    """A token a letter; 0 ends a text."""

    eos_token_id = 0

    def __call__(self, text, verbose=True):
        return {"input_ids": [ord(letter) - 96 for letter in text]}


def next_letter(tokens):
    """Logits [1, s, 27] of a model that is fairly sure of the alphabet's order."""
    return 2.0 * torch.nn.functional.one_hot((tokens + 1) % 27, 27)


def test_tokens_after_the_last_full_window_are_counted_as_left_out():
    alphabet = "abcdefghijklmnopqrstuvwxyz"
    right = -math.log(math.exp(2) / (math.exp(2) + 26))
    for seq_length, tokens, left_out in ((13, 26, 0), (10, 20, 6), (26, 26, 0), (14, 14, 12)):
        found = _perplexity(pack_text([alphabet], Letters(), seq_length), next_letter)
        assert found == Perplexity(pytest.approx(right, rel=1e-6), tokens, left_out)
        assert found.tokens + found.tokens_left_out == 26  # 27 with the end, the first is no label


def test_the_loss_is_the_mean_over_all_windows():
    found = _perplexity(pack_text(["abcdz"], Letters(), 5), next_letter)
    total = math.log(math.exp(2) + 26)
    assert found == Perplexity(pytest.approx(total - 2 * 4 / 5, rel=1e-6), 5, 0)  # a "z" is wrong

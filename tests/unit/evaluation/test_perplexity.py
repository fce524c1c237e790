"""Perplexity of a text: every token but the first is predicted once, in windows of any stride."""

import math

import pytest
import torch

from mqat.errors import UserError
from mqat.evaluation.perplexity import Perplexity, text_perplexity
from mqat.evaluation.scoring import Request, score, windows

ALPHABET = "abcdefghijklmnopqrstuvwxyz"
RIGHT = -math.log(math.exp(2) / (math.exp(2) + 26))


class Letters:
    """A token a letter; 0 ends a text."""

    eos_token_id = 0

    def __call__(self, text, verbose=True, add_special_tokens=True):
        return {"input_ids": [ord(letter) - 96 for letter in text.strip()]}


class CapitalLetters(Letters):
    """Begins every text with a "z"."""

    def __call__(self, text, verbose=True, add_special_tokens=True):
        begin = [26] if add_special_tokens else []
        return {"input_ids": begin + super().__call__(text)["input_ids"]}


class Alphabet:
    """A model that is fairly sure of the alphabet's order; remembers how long sequences were."""

    def __init__(self, longest=40):
        self.tokenizer, self.longest, self.share, self.widths = Letters(), longest, (0, 1), []

    def score(self, tokens, rows, places, targets):
        self.widths.append(tokens.shape)
        logits = 2.0 * torch.nn.functional.one_hot((tokens + 1) % 27, 27)[rows, places]
        return logits.log_softmax(-1).gather(1, targets), logits.argmax(-1)


@pytest.fixture
def alphabet(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(ALPHABET, encoding="utf-8")
    return file


@pytest.mark.parametrize(
    ("seq_length", "stride"), [(13, None), (10, None), (26, None), (14, 3), (10, 1), (40, 40)]
)
def test_every_token_but_the_first_is_predicted_once(alphabet, seq_length, stride):
    model = Alphabet()
    found = text_perplexity(model, alphabet, seq_length=seq_length, stride=stride)
    assert found == Perplexity(pytest.approx(RIGHT, rel=1e-6), 26)  # 27 with the end
    assert max(width for _, width in model.widths) == min(seq_length, 26)


def test_the_loss_is_the_mean_over_all_windows(tmp_path):
    (tmp_path / "text.txt").write_text("abcdz", encoding="utf-8")
    found = text_perplexity(Alphabet(), tmp_path / "text.txt", seq_length=2)
    total = math.log(math.exp(2) + 26)
    assert found == Perplexity(pytest.approx(total - 2 * 4 / 5, rel=1e-6), 5)  # a "z" is wrong


def test_windows_are_full_and_overlap_by_what_the_stride_leaves():
    tokens = list(range(12))
    asked = [(list(w.context), list(w.continuation)) for w in windows(tokens, 4, 4)]
    assert asked == [([0], [1, 2, 3, 4]), ([4], [5, 6, 7, 8]), ([7, 8], [9, 10, 11])]
    asked = [(list(w.context), list(w.continuation)) for w in windows(tokens, 6, 3)]
    assert asked == [
        ([0], [1, 2, 3, 4, 5, 6]), ([3, 4, 5, 6], [7, 8, 9]), ([5, 6, 7, 8, 9], [10, 11])
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_length": 41}, "--seq-length 40 or less"),
        ({"seq_length": 8, "stride": 9}, "--stride 9 must be between 1 and --seq-length 8"),
    ],
)
def test_windows_that_lose_tokens_are_refused(alphabet, options, message):
    with pytest.raises(UserError, match=message):
        text_perplexity(Alphabet(), alphabet, **options)


def test_answers_of_one_question_share_a_pass_and_have_their_own_scores():
    model, context = Alphabet(), [1, 2, 3]
    asked = [Request(context, [n]) for n in (4, 5, 6)] + [Request([7], [8, 9, 11])]
    asked += [Request([1, 2], [3, 4])]  # the same tokens, cut otherwise
    found = score(model, asked, batch_size=4)
    assert model.widths == [(2, 3)]
    assert [one.is_greedy for one in found] == [True, False, False, False, True]
    totals = [-RIGHT, -RIGHT - 2, -RIGHT - 2, -3 * RIGHT - 2, -2 * RIGHT]
    assert [one.total for one in found] == pytest.approx(totals, rel=1e-6)


def test_every_window_begins_as_a_text_does_and_that_is_not_predicted(tmp_path):
    (tmp_path / "text.txt").write_text("abcdefgh", encoding="utf-8")
    model = Alphabet()
    model.tokenizer = CapitalLetters()
    found = text_perplexity(model, tmp_path / "text.txt", seq_length=5)
    # z a b c d | z d e f g | z g h 0: the first "a" follows a "z", the end follows no "z".
    total = math.log(math.exp(2) + 26)
    assert found == Perplexity(pytest.approx(total - 2 * 7 / 9, rel=1e-6), 9)

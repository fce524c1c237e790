"""Which tokens of an activation are real, on a rank that has all of them or a part of the sequence."""

import pytest
import torch

from mqat.parallel.quantized_module import QuantizedModule, set_token_mask
from mqat.quant.algorithm import named_scheme
from mqat.quant.quantizer import Quantizer


class Rank:
    def __init__(self, rank, size):
        self._rank, self._size = rank, size

    def rank(self):
        return self._rank

    def size(self):
        return self._size


class Module(QuantizedModule):
    def __init__(self, rank, size):
        super().__init__()
        self.quantized_name, self.tp_group = "m", Rank(rank, size)
        self._quantizer = Quantizer(named_scheme("int8").input, None, "m.input")

    @property
    def quantizers(self):
        return {"input": self._quantizer}


MASK = torch.tensor([[1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0]], dtype=torch.bool)  # [b, s]
X = torch.arange(24.0).view(6, 2, 2)  # [s, b, h]
REAL = X[torch.tensor([0, 0, 1, 1, 2, 3]), torch.tensor([0, 1, 0, 1, 1, 1])]


def test_without_a_mask_every_token_is_real():
    assert torch.equal(Module(0, 1).real_tokens(X), X.view(12, 2))


def test_real_tokens_of_the_ranks_of_a_cut_sequence_are_those_of_the_whole():
    whole = Module(1, 2)
    set_token_mask(whole, MASK)
    assert torch.equal(whole.real_tokens(X), REAL)  # all ranks have the whole sequence
    parts = []
    for rank, x in enumerate(X.chunk(3)):
        module = Module(rank, 3)
        set_token_mask(module, MASK)
        parts.append(module.real_tokens(x))
    assert torch.equal(torch.cat(parts), REAL)
    assert len(parts[2]) == 0
    set_token_mask(whole, None)
    assert torch.equal(whole.real_tokens(X), X.view(12, 2))


def test_a_mask_of_another_shape_is_found_out():
    module = Module(0, 2)
    set_token_mask(module, MASK[:1])
    with pytest.raises(AssertionError, match=r"m: torch.Size\(\[3, 2, 2\]\) with"):
        module.real_tokens(X[:3])


def test_an_observer_that_is_shown_no_real_token_has_seen_nothing():
    module = Module(0, 1)
    module.observe("input", X)  # not observing: nothing happens
    observer = module._quantizer
    observer.start_observing("percentile")
    set_token_mask(module, torch.zeros_like(MASK))
    module.observe("input", X.log())  # -inf at 0
    assert not observer.observer.statistics.any() and not observer.observer.histogram.any()
    set_token_mask(module, MASK)
    module.observe("input", X)
    module.observe("output", X)  # it has none
    assert observer.observer.statistics.tolist() == [0, float(REAL.max()), 1, 0]
    assert int(observer.observer.histogram.sum()) == REAL.numel()

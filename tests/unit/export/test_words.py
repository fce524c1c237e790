"""Packed words against a loop over bits."""

import pytest
import torch

from mqat.export.words import pack_words


def by_bits(codes, bits):
    """Words of one row after another, built as integers."""
    rows = []
    for row in codes.tolist():
        words = [0] * -(-len(row) * bits // 32)
        for column, code in enumerate(row):
            words[column * bits // 32] |= (code + (1 << bits - 1)) << column * bits % 32
        rows.append([word - (1 << 32) if word >> 31 else word for word in words])
    return torch.tensor(rows, dtype=torch.int32)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [(1, 1), (3, 8), (5, 37), (37, 1), (2, 64)])
def test_columns_fill_words_from_the_lowest_bits(bits, shape):
    half = 1 << bits - 1
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-half, half, shape, generator=generator, dtype=torch.int8)
    before = codes.clone()
    assert torch.equal(pack_words(codes, bits), by_bits(codes, bits))
    assert torch.equal(
        pack_words(codes.t(), bits), by_bits(codes.t(), bits)
    )  # strides of every kind
    assert torch.equal(pack_words(codes[:, :1].t(), bits), by_bits(codes[:, :1].t(), bits))
    assert torch.equal(codes, before)


def test_every_pair_of_neighbours():
    codes = torch.cartesian_prod(*[torch.arange(-8, 8, dtype=torch.int8)] * 2)
    assert torch.equal(pack_words(codes, 4), by_bits(codes, 4))


@pytest.mark.parametrize(
    ("codes", "bits", "message"),
    [
        (torch.tensor([[8]], dtype=torch.int8), 4, r"codes span 8\.\.8, not 4 bits"),
        (torch.zeros(4, dtype=torch.int8), 4, r"torch\.int8 \(4,\)"),
        (torch.zeros(1, 4, dtype=torch.int16), 4, r"torch\.int16"),
        (torch.zeros(1, 4, dtype=torch.int8), 5, "5 bits"),
    ],
)
def test_what_does_not_fit_is_refused(codes, bits, message):
    with pytest.raises(AssertionError, match=message):
        pack_words(codes, bits)

import pytest
import torch

from mqat.quant.packing import pack_int4, pack_nibbles, unpack_nibbles


def test_even_rows_are_in_the_low_nibble():
    codes = torch.tensor([[1, -8], [-1, 7]], dtype=torch.int8)
    assert pack_int4(codes).view(torch.uint8).tolist() == [[0xF1, 0x78]]


def test_every_pair_of_codes_has_a_byte_of_its_own():
    code = torch.arange(-8, 8, dtype=torch.int8)
    pairs = torch.stack([code.repeat_interleave(16), code.repeat(16)])
    expected = [[(low & 15) + 16 * (high & 15) for low, high in pairs.t().tolist()]]
    assert pack_int4(pairs).view(torch.uint8).tolist() == expected


def test_a_slice_of_columns_is_packed_like_its_copy():
    codes = torch.arange(-8, 8, dtype=torch.int8).repeat(4, 1)[:, 3:9]
    assert torch.equal(pack_int4(codes), pack_int4(codes.contiguous()))


@pytest.mark.parametrize("shape", [(3, 4), (4,)])
def test_odd_rows_and_vectors_are_refused(shape):
    with pytest.raises(AssertionError, match=r"torch\.int8"):
        pack_int4(torch.zeros(shape, dtype=torch.int8))


def test_other_dtypes_are_refused():
    with pytest.raises(AssertionError, match=r"torch\.int32"):
        pack_int4(torch.zeros(2, 2, dtype=torch.int32))


@pytest.mark.parametrize("code", [8, -9, 127])
def test_codes_beyond_four_bits_are_refused_not_cut(code):
    with pytest.raises(AssertionError, match=r"four bits hold -8\.\.7"):
        pack_int4(torch.tensor([[0], [code]], dtype=torch.int8))


def test_even_columns_are_in_the_low_nibble_of_neighbours():
    assert pack_nibbles(torch.tensor([1, 15, 8, 0], dtype=torch.uint8)).tolist() == [0xF1, 0x08]


def test_neighbours_are_unpacked_as_packed():
    codes = torch.arange(16, dtype=torch.uint8).repeat(2, 3).view(3, 2, 16)
    assert pack_nibbles(codes).shape == (3, 2, 8)
    assert torch.equal(unpack_nibbles(pack_nibbles(codes)), codes)


def test_wrong_neighbours_are_refused():
    with pytest.raises(AssertionError, match=r"4, 3"):
        pack_nibbles(torch.zeros(4, 3, dtype=torch.uint8))
    with pytest.raises(AssertionError, match=r"torch\.int8"):
        pack_nibbles(torch.zeros(4, dtype=torch.int8))
    with pytest.raises(AssertionError, match=r"0\.\.15"):
        pack_nibbles(torch.tensor([0, 16], dtype=torch.uint8))
    with pytest.raises(AssertionError, match="extend the sign"):
        unpack_nibbles(torch.zeros(1, dtype=torch.int8))

import pytest
import torch

from mqat.quant.granularity import (
    PerBlock,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    granularity_from_str,
)
from mqat.quant.scales import compute_amax, compute_range

X = torch.tensor([[1.0, -2.0, 3.0, 40.0, -5.0], [0.0, 0.5, 0.0, 0.0, -6.0]])


@pytest.mark.parametrize(
    ("granularity", "expected"),
    [
        (PerTensor(), [40.0]),
        (PerChannel(), [40.0, 6.0]),
        (PerGroup(2), [[2.0, 40.0, 5.0], [0.5, 0.0, 6.0]]),  # the last group holds one element
        (PerGroup(5), [[40.0], [6.0]]),
        (PerGroup(64), [[40.0], [6.0]]),
        (PerToken(), [40.0, 6.0]),
        (PerBlock(2), [[2.0, 40.0, 6.0]]),
        (PerBlock(128), [[40.0]]),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_amax_is_the_largest_magnitude_of_each_group(granularity, expected, dtype):
    amax = compute_amax(X.to(dtype).requires_grad_(), granularity)
    assert amax.dtype == torch.float32 and not amax.requires_grad
    assert amax.tolist() == expected
    assert amax.shape == granularity.scale_shape(tuple(X.shape))


def test_expanded_scales_reach_every_element_of_their_group():
    scale = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    assert PerGroup(2).expand(scale, (2, 5)).tolist() == [[1, 1, 2, 2, 3], [4, 4, 5, 5, 6]]
    assert PerChannel().expand(torch.tensor([1.0, 2.0]), (2, 5)).tolist() == [[1.0], [2.0]]
    assert PerTensor().expand(torch.tensor([7.0]), (3, 2, 5)).tolist() == [7.0]


def test_nan_is_not_lost_in_the_maximum():
    assert compute_amax(torch.tensor([[1.0, float("nan")]]), PerTensor()).isnan().all()


@pytest.mark.parametrize(
    "granularity", [PerTensor(), PerChannel(), PerToken(), PerGroup(128), PerBlock(128)]
)
def test_names_in_checkpoints_are_read_back(granularity):
    assert granularity_from_str(str(granularity)) == granularity


@pytest.mark.parametrize("text", ["", "row", "group", "group:", "group:x", "group:-4", "channel:2"])
def test_unknown_names_are_refused(text):
    with pytest.raises(
        ValueError, match="expected 'tensor', 'channel', 'token', 'group:<size>' or"
    ):
        granularity_from_str(text)


def test_a_group_has_at_least_one_element():
    with pytest.raises(ValueError, match="group_size=0 must be at least 1"):
        PerGroup(0)


def test_ranges_are_the_largest_negative_and_positive_parts_and_at_least_zero():
    extent = compute_range(X, PerGroup(2))
    assert extent.tolist() == [[[2, 0, 5], [0, 0, 6]], [[1, 40, 0], [0.5, 0, 0]]]
    both = torch.maximum(compute_range(X[:, :3], PerTensor()), compute_range(X[:, 3:], PerTensor()))
    assert torch.equal(both, compute_range(X, PerTensor()))  # ranges of parts merge by MAX


def test_tokens_of_activations_have_a_scale_each():
    x = X[:, None].repeat(1, 3, 1)
    assert compute_amax(x, PerToken()).shape == (2, 3)
    assert compute_amax(x, PerGroup(2)).shape == (2, 3, 3)
    assert PerGroup(2).expand(compute_amax(x, PerGroup(2)), tuple(x.shape)).shape == x.shape


def test_squares_reach_their_elements_and_no_others():
    scale = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    expected = [[1, 1, 2], [1, 1, 2], [3, 3, 4]]
    assert PerBlock(2).expand(scale, (3, 3)).tolist() == expected

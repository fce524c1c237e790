import pytest
import torch

from mqat.quant.granularity import PerChannel, PerGroup, PerTensor, granularity_from_str

X = torch.tensor([[1.0, -2.0, 3.0, 40.0, -5.0], [0.0, 0.5, 0.0, 0.0, -6.0]])


@pytest.mark.parametrize(
    ("granularity", "expected"),
    [
        (PerTensor(), [40.0]),
        (PerChannel(), [40.0, 6.0]),
        (PerGroup(2), [[2.0, 40.0, 5.0], [0.5, 0.0, 6.0]]),  # the last group holds one element
        (PerGroup(5), [[40.0], [6.0]]),
        (PerGroup(64), [[40.0], [6.0]]),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_amax_is_the_largest_magnitude_of_each_group(granularity, expected, dtype):
    amax = granularity.amax(X.to(dtype).requires_grad_())
    assert amax.dtype == torch.float32 and not amax.requires_grad
    assert amax.tolist() == expected
    assert amax.shape == granularity.scale_shape(tuple(X.shape))


def test_expanded_scales_reach_every_element_of_their_group():
    scale = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    assert PerGroup(2).expand(scale, (2, 5)).tolist() == [[1, 1, 2, 2, 3], [4, 4, 5, 5, 6]]
    assert PerChannel().expand(torch.tensor([1.0, 2.0]), (2, 5)).tolist() == [[1.0], [2.0]]
    assert PerTensor().expand(torch.tensor([7.0]), (3, 2, 5)).tolist() == [7.0]


def test_nan_is_not_lost_in_the_maximum():
    assert PerTensor().amax(torch.tensor([[1.0, float("nan")]])).isnan().all()


@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(), PerGroup(128)])
def test_names_in_checkpoints_are_read_back(granularity):
    assert granularity_from_str(str(granularity)) == granularity


@pytest.mark.parametrize("text", ["", "row", "group", "group:", "group:x", "group:-4", "channel:2"])
def test_unknown_names_are_refused(text):
    with pytest.raises(ValueError, match="expected 'tensor', 'channel' or 'group:<size>'"):
        granularity_from_str(text)


def test_a_group_has_at_least_one_element():
    with pytest.raises(ValueError, match="group_size=0 must be at least 1"):
        PerGroup(0)

"""What a run says about itself at its end."""

import pytest


@pytest.mark.parametrize(
    ("ptq", "qat", "share"),
    [
        (30.0, 25.0, 0.5),
        (30.0, 20.0, 1.0),
        (20.05, 24.0, None),  # a ratio would be -7900%
        (19.0, 18.0, None),
    ],
)
def test_no_share_is_recovered_of_a_gap_that_is_noise(ptq, qat, share):
    from mqat.training.recipes import gap_recovered

    assert gap_recovered({"bf16": 21.0, "bf16_finetuned": 20.0, "ptq": ptq, "qat": qat}) == share


def test_without_ptq_there_is_no_gap():
    from mqat.training.recipes import gap_recovered

    assert gap_recovered({"bf16": 21.0, "qat": 20.0}) is None

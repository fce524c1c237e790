"""Which experts are idle, by the tokens that they and the others of their layer saw."""

import pytest

from mqat.calibration.idle_experts import MIN_TOKENS, unreached


def idle(*counts):
    """Numbers of the idle ones of a layer of experts that saw so many tokens; another layer saw more."""
    name = "decoder.layers.{}.mlp.experts.{}.linear_fc1".format
    tokens = {name(1, n): count for n, count in enumerate(counts)}
    other = {name(0, n): 1000 for n in range(3)}
    return [int(found.split(".")[-2]) for found in sorted(unreached({}, tokens | other))]


@pytest.mark.parametrize(("counts", "expected"), [
    ((500, MIN_TOKENS, MIN_TOKENS - 1, 1, 0), [2, 3, 4]),
    ((MIN_TOKENS - 1, 5, 0), [2]),  # none has enough: what there is has to do
    ((0, 0, 0), []),  # nothing went through the layer, which is an error of its own
    ((500, 400), []),
])  # fmt: skip
def test_few_tokens_are_as_good_as_none_among_others_with_more(counts, expected):
    assert idle(*counts) == expected

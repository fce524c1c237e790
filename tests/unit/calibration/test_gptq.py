"""Error-compensated rounding against a plain transcription of the algorithm."""

import pytest
import torch

from mqat.calibration.gptq import inverse_factor, round_shard
from mqat.quant.formats import FP4_E2M1, INT4, UINT4
from mqat.quant.granularity import PerChannel, PerGroup
from mqat.quant.qparams import frozen_qparams, rounded, statistic_of
from mqat.quant.scheme import TensorScheme

WIDTH = 160  # more than one run of columns
SCHEMES = {
    "channel": TensorScheme(INT4, PerChannel()),
    "group": TensorScheme(INT4, PerGroup(32), torch.bfloat16),
    "asymmetric": TensorScheme(UINT4, PerGroup(32), is_asymmetric=True),
    "levels": TensorScheme(FP4_E2M1, PerGroup(16), torch.float8_e4m3fn),
}


@pytest.fixture(scope="module")
def problem():
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(WIDTH, WIDTH, generator=generator) * 0.3
    x = torch.randn(512, WIDTH, generator=generator) @ (torch.eye(WIDTH) + mixing)
    return torch.randn(8, WIDTH, generator=generator), x, (x.t() @ x).double()


def by_column(weight, scheme, statistic, above, hessian):
    """One column at a time in float64, the inverse Hessian updated by elimination."""
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    hessian = hessian[order][:, order].clone()
    hessian.diagonal().add_(0.01 * float(hessian.diagonal().mean()))
    inverse = torch.linalg.inv(hessian)
    left = weight.double().clone()
    for number, column in enumerate(order.tolist()):
        grid = rounded(left.float(), scheme, statistic, above).double()[:, column]
        error = (left[:, column] - grid) / inverse[number, number]
        later = order[number + 1 :]
        left[:, later] -= error[:, None] * inverse[number, number + 1 :]
        left[:, column] = grid
        inverse = (
            inverse - torch.outer(inverse[:, number], inverse[number]) / inverse[number, number]
        )
    return left.float()


@pytest.mark.parametrize("name", SCHEMES)
def test_runs_of_columns_give_what_single_columns_give(problem, name):
    weight, x, hessian = problem
    scheme = SCHEMES[name]
    statistic = statistic_of(weight, scheme)
    above = statistic.amax().reshape(1) if scheme.has_global_scale else None
    frozen = frozen_qparams(statistic, scheme, above)
    found = round_shard(weight, frozen, *inverse_factor(hessian), scheme)
    expected = by_column(weight, scheme, statistic, above, hessian)
    # float32 against float64: a few values lie on the other side of a rounding border
    assert (found != expected).float().mean() < 0.05

    nearest = rounded(weight, scheme, statistic, above)
    error, plain, reference = (
        float((x @ (w - weight).t()).square().sum()) for w in (found, nearest, expected)
    )
    assert error < 0.7 * plain
    assert error == pytest.approx(reference, rel=0.05)
    torch.testing.assert_close(rounded(found, scheme, statistic, above), found, rtol=0, atol=1e-6)


def test_channels_that_were_never_used_round_to_nearest():
    weight = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    scheme = SCHEMES["channel"]
    frozen = frozen_qparams(statistic_of(weight, scheme), scheme)
    found = round_shard(weight, frozen, *inverse_factor(torch.zeros(8, 8).double()), scheme)
    torch.testing.assert_close(found, rounded(weight, scheme))


def test_a_matrix_that_no_damping_repairs_is_refused():
    broken = torch.diag(torch.tensor([1.0, -1e6])).double()
    with pytest.raises(ValueError, match="not positive definite"):
        inverse_factor(broken)

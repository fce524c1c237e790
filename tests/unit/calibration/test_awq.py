"""AWQ's clip search against the output error it is to lower."""

import torch

from mqat.calibration.awq import AWQ
from mqat.calibration.clipping import WeightShard
from mqat.calibration.mse import MSE
from mqat.quant.formats import INT4
from mqat.quant.granularity import PerGroup
from mqat.quant.qparams import rounded, statistic_of
from mqat.quant.scheme import TensorScheme

GROUPS = TensorScheme(INT4, PerGroup(4))


def test_awq_weighs_errors_by_the_inputs_they_meet():
    weight = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(1)) * torch.logspace(-2, 1, 16)
    hessian = (x.t() @ x).double()

    def output_error(amax):
        # groups interact in the output; clip search looks at each group alone
        error = rounded(weight, GROUPS, amax) - weight
        blocks = error.view(6, 4, 4), x.view(64, 4, 4)
        return float(torch.einsum("rgk,tgk->rtg", *blocks).square().sum())

    def chosen(method):
        measured = method.measure(WeightShard(weight, plain, GROUPS, hessian=hessian))
        return method.choose(plain, measured, GROUPS)

    plain = statistic_of(weight, GROUPS)
    assert output_error(chosen(AWQ)) < output_error(chosen(MSE))
    assert output_error(chosen(AWQ)) < output_error(plain)

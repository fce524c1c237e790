from mqat.calibration.clipping_methods import CLIPPING_METHODS
from mqat.quant.algorithm import WEIGHT_CALIBRATORS


def test_every_name_that_a_configuration_may_give_has_a_method():
    assert WEIGHT_CALIBRATORS == ("max", *CLIPPING_METHODS)

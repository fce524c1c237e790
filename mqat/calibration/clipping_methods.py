"""The one list of clipping methods, by their `quantization.weight_calibrator`."""

from mqat.calibration.awq import AWQ
from mqat.calibration.clipping import ClippingMethod
from mqat.calibration.four_over_six import FOUR_OVER_SIX
from mqat.calibration.mse import MSE
from mqat.calibration.sawb import SAWB

# Without `max`, which leaves statistics as they are; `quant.algorithm.WEIGHT_CALIBRATORS` names them.
CLIPPING_METHODS: dict[str, ClippingMethod] = {
    "mse": MSE,
    "awq": AWQ,
    "sawb": SAWB,
    "four_over_six": FOUR_OVER_SIX,
}

"""Which quantizers are on at a step, seen in what they return."""

import torch

from mqat.parallel.linear import quantized_linears
from mqat.training.schedule import QuantizerSchedule


def levels(chunks, kind: str) -> list[int]:
    """Distinct values that each quantizer returns: at most 255, or as many as it was given."""
    x = torch.linspace(-1, 1, 8192).view(-1, 128)
    found = []
    for linear in quantized_linears(chunks).values():
        quantizer = linear.quantizers[kind]
        given = linear.weight if kind == "weight" else x * quantizer.scale * 127
        found.append(
            max(int(row.unique().numel()) for row in quantizer(given.detach().view(-1, 4096)))
        )
    return found


def test_quantizers_are_off_until_their_step_and_then_on(calibrated):
    chunks = calibrated("int4_w_int8_a")
    schedule = QuantizerSchedule(on_after=2, inputs_on_after=5)
    for step, weights_on, inputs_on in ((0, False, False), (2, True, False), (5, True, True)):
        schedule.apply_(chunks, step)
        assert all((count <= 16 * 64) == weights_on for count in levels(chunks, "weight"))
        assert all((count <= 256) == inputs_on for count in levels(chunks, "input"))
    schedule.apply_(chunks, 0)
    QuantizerSchedule().apply_(chunks, 0)  # what follows a phase: all on
    assert all(count <= 256 for count in levels(chunks, "input"))


def test_stages_follow_the_step_and_end_in_the_scheme(calibrated):
    chunks = calibrated("int4")
    schedule = QuantizerSchedule(bits=[(0, 8), (3, 6), (5, 4)])
    names = []
    for step in range(7):
        schedule.apply_(chunks, step)
        linears = quantized_linears(chunks).values()
        found = {linear.weight_quantizer.format.name for linear in linears}
        assert len(found) == 1
        assert all(linear._is_fast() == (step >= 5) for linear in linears)
        names += found
    assert names == ["int8"] * 3 + ["int6"] * 2 + ["int4"] * 2

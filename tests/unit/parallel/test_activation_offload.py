"""Saved activations travel to the host and back; what does not, and that gradients stay what they were.

Run on the CPU, whose tensors stand for a GPU's here.
"""

import pytest
import torch

from tests.unit.model_fixtures import microbatches


@pytest.mark.parametrize("algorithm", ["null", "int8"])
def test_gradients_are_the_same_bits_and_parameters_do_not_travel(
    calibrated, monkeypatch, algorithm
):
    from mqat.parallel import activation_offload
    from mqat.training import step

    chunks = calibrated(algorithm)
    moved, packed = [], []
    real = activation_offload._pack(1024, "cpu")

    def pack(saved):
        packed.append(saved)
        found = real(saved)
        if not isinstance(found, torch.Tensor):
            moved.append(saved)
        return found

    monkeypatch.setattr(activation_offload, "_pack", lambda *_: pack)

    def gradients(**how):
        for chunk in chunks:
            chunk.zero_grad_buffer()
        step.forward_backward(chunks, microbatches(), **how)
        return [p.main_grad.clone() for chunk in chunks for p in chunk.parameters()]

    expected = gradients()
    assert not packed  # control: nothing unless asked for
    assert all(map(torch.equal, gradients(offloads_activations=True), expected))
    places = {p.data_ptr() for chunk in chunks for p in chunk.parameters()}
    assert len(moved) > 10 and not places & {saved.data_ptr() for saved in moved}
    assert places & {saved.data_ptr() for saved in packed}  # control: some were asked to


def test_small_tensors_and_those_of_other_devices_stay():
    from mqat.parallel.activation_offload import _pack, _unpack

    saved = torch.ones(1024)
    assert _pack(4097, "cpu")(saved) is saved and _pack(1, "cuda")(saved) is saved
    packed = _pack(4096, "cpu")(saved)
    saved.zero_()  # the host has a copy
    assert torch.equal(_unpack(packed), torch.ones(1024))

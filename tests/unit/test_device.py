"""When GPUs are hidden from tests, and the reason that a skipped one prints."""

import os

import pytest
import torch

from tests import device


@pytest.mark.parametrize("markers", ["gpu", "gpu and not slow", " not slow and gpu"])
def test_gpus_are_seen_where_only_gpu_tests_are_selected(markers, monkeypatch):
    monkeypatch.setattr(os, "environ", {})
    device.choose("cpu", markers)
    assert os.environ == {}


@pytest.mark.parametrize("markers", ["", "not slow", "not gpu", "gpu or slow", "not gpu and slow"])
@pytest.mark.parametrize(("gpus", "reason"), [(0, device.NO_CUDA), (2, device.HIDDEN)])
def test_otherwise_they_are_hidden_and_the_reason_says_whether_there_are_any(
    markers, gpus, reason, monkeypatch
):
    monkeypatch.setattr(os, "environ", {})
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # as after hiding
    device.choose("cpu", markers)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "-1"
    assert device.reason_to_skip() == reason
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert device.reason_to_skip() is None

"""Histograms of gradients are those of whole parameters on every layout."""

import json
import math
from pathlib import Path

import torch

from mqat.training.histograms import EDGES, LOWEST, magnitudes
from tests.distributed.ranks import run_ranks

WORKER = Path(__file__).with_name("histograms_worker.py")
TWO = {"tp2": [2, 1, False], "tp2-sp": [2, 1, True], "pp2": [1, 2, False], "dp2": [1, 1, False]}


def run(directory, processes, layouts):
    file = directory / f"{processes}.json"
    done = run_ranks(processes, WORKER, file, json.dumps(layouts), timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(file.read_text())


def test_gradients_are_counted_once_whatever_the_layout(tmp_path):
    expected = run(tmp_path, 1, {"one": [1, 1, False]})["one"]
    assert any(name.endswith("linear_fc1.weight") for name in expected)
    for name, found in run(tmp_path, 2, TWO).items():
        assert found.keys() == expected.keys(), name
        for parameter, counts in found.items():
            assert sum(counts) == sum(expected[parameter]), (name, parameter)
            # Sums in another order move elements across a bin's border here and there.
            moved = sum(abs(a - b) for a, b in zip(counts, expected[parameter], strict=True)) / 2
            assert moved <= max(1, 1e-3 * sum(counts)), (name, parameter)
    fc1, norm = (
        next(counts for name, counts in expected.items() if name.endswith(end))
        for end in ("layers.0.mlp.linear_fc1.weight", "final_layernorm.weight")
    )
    assert fc1 != norm and sum(count > 0 for count in fc1) > 5  # control: they say something


def test_bins_are_powers_of_two():
    x = torch.tensor([0.0, 1.0, -1.5, 2.0, 2.0**-60, 1e30, -0.25])
    counts = magnitudes(x)
    assert len(counts) == len(EDGES) - 1
    found = {LOWEST + i: n for i, n in enumerate(counts.tolist()) if n}
    assert found == {LOWEST: 2, -2: 1, 0: 2, 1: 1, int(EDGES[-1]) - 1: 1}
    assert math.log2(1.5) < 1  # 1 and -1.5 share a bin

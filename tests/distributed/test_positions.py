"""Scalings, windows, second rotary bases and caps compute the same on every layout of two processes."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from tests.distributed.positions_worker import LAYOUTS
from tests.distributed.ranks import run_ranks
from tests.unit.checkpoints.test_positions import LIMIT, transformers_model

WORKER = Path(__file__).with_name("positions_worker.py")
MODELS = ("yarn", "longrope, long", "window from a layer on", "gemma 2", "gemma 3")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Expected logits, and what each layout found."""
    folder = tmp_path_factory.mktemp("models")
    tokens = torch.randint(0, 97, (2, 40), generator=torch.Generator().manual_seed(1))
    torch.save(tokens, folder / "tokens.pt")
    expected = {}
    for name in MODELS:
        model = transformers_model(name, num_hidden_layers=4)
        model.save_pretrained(folder / name)
        with torch.no_grad():
            expected[name] = model(tokens).logits
    done = run_ranks(2, WORKER, folder, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return tokens, expected, torch.load(folder / "results.pt")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MODELS)
def test_every_layout_gives_transformers_numbers(found, name, layout):
    tokens, expected, results = found
    wanted = expected[name]
    if layout == "cp":
        labels = tokens.roll(-1, dims=1)
        wanted = F.cross_entropy(wanted.transpose(1, 2), labels, reduction="none")
    assert (results[layout, name] - wanted).abs().max() <= LIMIT
    assert (results[layout, name].roll(1, dims=1) - wanted).abs().max() > LIMIT  # control

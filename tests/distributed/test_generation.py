"""The same tokens and scores on every layout of two processes, whatever the seed."""

from pathlib import Path

import pytest
import torch

from mqat.runtime import groups
from tests.distributed.generation_worker import LAYOUTS, build, texts
from tests.distributed.ranks import run_ranks
from tests.unit.checkpoints.test_positions import transformers_model

WORKER = Path(__file__).with_name("generation_worker.py")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Of one process, and of both ranks at each layout."""
    folder = tmp_path_factory.mktemp("model")
    transformers_model("gemma 3", num_hidden_layers=4).save_pretrained(folder)
    done = run_ranks(2, WORKER, folder, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    groups.initialize()
    expected = texts(build(folder, {}))
    groups.finalize()
    return expected, [torch.load(folder / f"results{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_texts_and_scores_on_every_rank(found, layout):
    expected, ranks = found
    for results in (rank[layout] for rank in ranks):
        for name in ("greedy", "seed 1", "seed 2"):
            assert results[name] == expected[name]
        assert results["scores"] == pytest.approx(expected["scores"], rel=1e-5)


def test_other_seeds_give_other_texts(found):
    expected, _ = found
    assert len({str(expected[name]) for name in ("greedy", "seed 1", "seed 2")}) == 3

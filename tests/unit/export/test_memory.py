"""Memory does not grow with the model: what an export holds beyond the mapped checkpoint."""

import ctypes
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mqat.export.export import export_hf, export_trtllm
from tests.unit.export.checkpoints import TINY, all_layers, write_checkpoint

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
WIDE = replace(
    TINY, hidden_size=1024, intermediate_size=4096, num_attention_heads=8, num_query_groups=8,
    head_dim=128, vocab_size=16384,
)  # fmt: skip


def anonymous_bytes() -> int:
    """Resident memory that belongs to no file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


def growth(work) -> int:
    ctypes.CDLL(None).malloc_trim(0)  # freed memory that is still held would hide what is used
    before = peak = anonymous_bytes()
    done = threading.Event()

    def sample():
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, anonymous_bytes())

    sampler = threading.Thread(target=sample)
    sampler.start()
    work()
    done.set()
    sampler.join()
    return peak - before


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["null", "int8", "int4", "fp8"])
def test_less_than_three_of_the_largest_tensor(algorithm, tmp_path):
    checkpoint = write_checkpoint(
        tmp_path / "c", WIDE, all_layers(algorithm, WIDE), dtype=torch.bfloat16
    )
    largest = 2 * max(2 * 4096 * 1024, 16384 * 1024)
    export_hf(checkpoint, tmp_path / "warm")  # what libraries allocate once
    for work in (
        lambda: export_hf(checkpoint, tmp_path / "hf"),
        lambda: export_trtllm(checkpoint, tmp_path / "trtllm", tensor_parallel=2),
    ):
        assert growth(work) < 3 * largest
    whole = sum(f.stat().st_size for f in (tmp_path / "hf").glob("*.safetensors"))
    assert whole > 1.2 * largest

    def load():
        from safetensors.torch import load_file

        kept = load_file(tmp_path / "hf" / "model.safetensors")
        assert len([tensor.clone() for tensor in kept.values()]) > 10

    assert growth(load) > 0.8 * whole  # control: the sampler sees what is held

"""Every dense family at every layout: transformers' logits, and the scales and bytes of one rank."""

from pathlib import Path

import pytest
import torch

from mqat.export.export import export_trtllm
from mqat.verify.verify import verify_export
from tests.distributed.ranks import run_ranks
from tests.unit.models.hf_models import transformers_model

WORKER = Path(__file__).with_name("families_worker.py")
FAMILIES = ("gemma", "nemotron-biased-tied", "starcoder2", "phi3", "gpt2", "chatglm")
LIMIT = 1e-3  # float32, other summation order
LAYOUTS = {
    "TP 2 + SP": (2, ["--tp", "2", "--sp"]),
    "TP 2": (2, ["--tp", "2"]),
    "PP 2": (2, ["--pp", "2"]),
}
FAST = "TP 2 + SP"
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS if name != FAST]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Directories, and transformers' logits for 24 tokens of each."""
    root, expected = tmp_path_factory.mktemp("models"), {}
    tokens = torch.randint(0, 97, (2, 24), generator=torch.Generator().manual_seed(1))
    for name in FAMILIES:
        hf = transformers_model(name)
        hf.save_pretrained(root / name)
        torch.save(tokens, root / name / "tokens.pt")
        with torch.no_grad():
            expected[name] = hf(tokens).logits
    return root, expected


@pytest.fixture(scope="module")
def run(models, tmp_path_factory):
    """Name of a layout -> folder of results."""
    done = {}

    def at(name: str) -> Path:
        if name not in done:
            out = tmp_path_factory.mktemp("out")
            count, options = (1, []) if name == "one rank" else LAYOUTS[name]
            ended = run_ranks(count, WORKER, models[0], out, *options, timeout=900)
            assert ended.returncode == 0, ended.stderr[-3000:]
            done[name] = out
        return done[name]

    return at


def rank_bytes(checkpoint: Path, out: Path) -> bytes:
    export_trtllm(checkpoint, out, tensor_parallel=2, dtype="float32")
    return b"".join((out / f"rank{rank}.safetensors").read_bytes() for rank in (0, 1))


@pytest.mark.parametrize("layout", [FAST, *SLOW])
def test_logits_scales_and_bytes_do_not_depend_on_the_layout(layout, models, run, tmp_path):
    alone, found = run("one rank"), run(layout)
    for name in FAMILIES:
        expected = models[1][name]
        results = torch.load(found / f"{name}.pt"), torch.load(alone / f"{name}.pt")
        for result in results:
            assert (result["plain"] - expected).abs().max() <= LIMIT, name
        assert (results[0]["plain"][:, 1:] - expected[:, :-1]).abs().max() > LIMIT  # control
        files = [
            rank_bytes(out / name, tmp_path / f"{name}{number}")
            for number, out in enumerate((alone, found))
        ]
        assert files[0] == files[1], name
        report = verify_export(tmp_path / f"{name}1", reference=found / name)
        assert report.problems == []

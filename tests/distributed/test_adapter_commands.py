"""Adapters are part of what `mqat generate` and `mqat eval` compute, at TP 1 and at TP 2."""

import json
import sys
from pathlib import Path
from pydoc_data import topics

import pytest
import torch

from mqat.checkpoints.random_weights import RandomWeights
from mqat.cli.__main__ import main
from mqat.config import ModelConfig
from mqat.data.tokenizer import train_small_tokenizer
from mqat.models.adapters import Adapters
from mqat.models.structure import DENSE_LINEARS, in_layer
from mqat.runtime import groups
from mqat.specs.policy import Policy
from tests.distributed.ranks import run_ranks
from tests.unit.model_fixtures import MODEL

WORKER = Path(__file__).with_name("command_worker.py")
NAMES = tuple(in_layer(i, x.name) for i in range(2) for x in DENSE_LINEARS)
TEXTS = list(topics.topics.values())
PROMPTS = ("The def statement", "A", "Names refer to objects")


def write_checkpoint(path: Path, algorithm: str, *, is_packed: bool, adapters: Adapters) -> None:
    """Of a model whose adapters do something."""
    groups.initialize()
    from torch.distributed import group

    from mqat.calibration.calibrate import calibrate
    from mqat.checkpoints.dist_checkpoint import save_checkpoint
    from mqat.checkpoints.packed_backbone import load_packed_
    from mqat.checkpoints.pretrained import load_pretrained_
    from mqat.parallel.add_adapters import adapters_of, add_adapters_
    from mqat.specs.model import build_model

    layers, source = Policy(algorithm, 64).schemes(MODEL), RandomWeights(MODEL, 1, 0.1)
    chunks = build_model(MODEL, ModelConfig(), layers, torch.float32, is_packed=is_packed)
    load_pretrained_(chunks, source)
    if is_packed:
        load_packed_(chunks, source)
    add_adapters_(chunks, adapters)
    calibrate(chunks, lambda: None, group=group.WORLD)
    generator = torch.Generator().manual_seed(0)
    for adapter in adapters_of(chunks).values():
        adapter.linear_out.data.normal_(std=0.1, generator=generator)
    save_checkpoint(
        path, chunks, model=MODEL, layers=layers, algorithm=algorithm, adapters=adapters,
        tokenizer=train_small_tokenizer(TEXTS[:20], 300),
    )  # fmt: skip
    groups.finalize()


@pytest.fixture(params=["int4 beside", "int4 merged", "nf4 packed"])
def checkpoints(request, tmp_path):
    """Two that differ in the strength of their adapters alone."""
    algorithm, kind = request.param.split()
    paths = tmp_path / "ckpt", tmp_path / "weaker"
    for path, alpha in zip(paths, (8.0, 0.01), strict=True):
        adapters = Adapters(NAMES, 4, alpha, is_merged=kind == "merged")
        write_checkpoint(path, algorithm, is_packed=kind == "packed", adapters=adapters)
    return paths


def test_adapters_count_in_generated_text_and_perplexity_at_tp_1_and_2(
    checkpoints, tmp_path, monkeypatch, capsys
):
    text = tmp_path / "text.txt"
    text.write_text(TEXTS[0][:2000], encoding="utf-8")

    def both(*arguments, ranks=1):
        """What the command finds: of texts their tokens, of a text its loss."""
        arguments = [str(x) for x in (*arguments, "--json", "--tensor-parallel", ranks)]
        if ranks == 1:
            monkeypatch.setattr(sys, "argv", ["mqat", *arguments])
            main()
            printed = capsys.readouterr().out
        else:
            done = run_ranks(ranks, WORKER, *arguments)
            assert done.returncode == 0, done.stderr[-3000:]
            printed = done.stdout
        lines = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
        return [line["tokens"] for line in lines if "prompt" in line] or lines[0]["loss"]

    generate = ("generate", checkpoints[0], *PROMPTS, "--max-tokens", 8)
    score = ("eval", checkpoints[0], "--text", text, "--seq-length", 64)
    tokens, loss = both(*generate), both(*score)
    assert both(*generate, ranks=2) == tokens and len(tokens) == len(PROMPTS)
    assert both(*score, ranks=2) == pytest.approx(loss, rel=1e-5)
    weaker = (
        both("generate", checkpoints[1], *generate[2:]),
        both("eval", checkpoints[1], *score[2:]),
    )
    assert weaker[0] != tokens and weaker[1] != pytest.approx(loss, rel=1e-3)  # control

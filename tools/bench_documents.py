"""Bytes that a step over packed documents needs, by sequence length: their ends, or a dense mask.

    python tools/bench_documents.py [--tokens 1024 2048 4096 8192] [--document 300] [--json]

A step of a two-layer model, forward and backward, in a process of its own for each row:

    mask    bytes of what says where documents are
    saved   most bytes of unique storages that autograd holds at one time, without parameters
    peak    growth of the process's peak memory during the step
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from typing import Any

import torch
from bench_memory import PeakSavedBytes

from mqat.config import ModelConfig
from mqat.data.packing import document_ends
from mqat.models.decoder import DecoderConfig
from mqat.runtime import groups

MODEL = DecoderConfig(
    vocab_size=512, hidden_size=256, intermediate_size=512, num_layers=2,
    num_attention_heads=4, num_query_groups=2, head_dim=64, tie_word_embeddings=True,
)  # fmt: skip


def dense_mask(segments: torch.Tensor) -> torch.Tensor:
    """Megatron's convention: bool [b, 1, s, s], True where a query must not look."""
    length = segments.shape[1]
    same = segments[:, :, None] == segments[:, None, :]
    return ~(same & torch.ones(length, length, dtype=torch.bool).tril())[:, None]


def measure(tokens: int, document: int, kind: str) -> dict[str, Any]:
    """One step."""
    groups.initialize()
    from mqat.checkpoints.pretrained import load_pretrained_
    from mqat.checkpoints.random_weights import RandomWeights
    from mqat.specs.model import build_model

    (model,) = build_model(MODEL, ModelConfig(), {}, torch.float32)
    load_pretrained_([model], RandomWeights(MODEL, 1, 0.1))
    saved = PeakSavedBytes(model)
    segments = (torch.arange(tokens) // document)[None]
    ids, positions = (torch.arange(tokens) % MODEL.vocab_size)[None], torch.arange(tokens)[None]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    mask = document_ends(segments) if kind == "ends" else dense_mask(segments)
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, saved.unpack):
        loss = model(ids, positions, mask, labels=ids).mean()
    loss.backward()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    groups.finalize()
    return {
        "tokens": tokens, "documents": -(-tokens // document), "kind": kind, "loss": loss.item(),
        "mask_bytes": mask.numel() * mask.itemsize, "saved_bytes": saved.peak["all"],
        "peak_bytes": peak * 1024,
    }  # fmt: skip


def main() -> None:
    """Prints a line, or an entry of JSON, for each length and kind."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--document", type=int, default=300, help="tokens of each document")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--one", choices=["ends", "dense"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.tokens[0], args.document, args.one)))
        return
    rows = []
    for tokens in args.tokens:
        for kind in ("ends", "dense"):
            command = [sys.executable, __file__, "--tokens", str(tokens), "--one", kind]
            command += ["--document", str(args.document)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(done.stderr)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
    if args.json:
        print(json.dumps({"results": rows}, indent=1))
        return
    for row in rows:
        sizes = (
            f"{name} {row[f'{name}_bytes'] / 2**20:8.2f} MiB" for name in ("mask", "saved", "peak")
        )
        print(
            f"{row['tokens']:>6} tokens {row['kind']:>6}  {'  '.join(sizes)}  loss {row['loss']:.6f}"
        )


if __name__ == "__main__":
    main()

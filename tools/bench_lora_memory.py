"""Bytes a parameter of full fine-tuning, QAT, LoRA and QLoRA, of the tensors that really exist.

    python tools/bench_lora_memory.py [--hidden 2048] [--rank 16] [--layers 4]

Layers of a Llama with that hidden size (its MLP four times as wide, a quarter of the heads for keys and
values), bf16, on one rank, after an optimizer step; divided by the weights of its linears.

`weights`: as they are held, packed or in bf16, with scales. `trained`: adapters. `gradients`: DDP's fp32
buffer. `optimizer`: AdamW's moments and fp32 copies. `of a step`: codes or values, and masks, that
quantization keeps between two optimizer steps. Activations are not counted.

`peak`: what the process grew by at most, from before it built the model until after the step (8 tokens),
each way in a process of its own (Linux). Its difference from `together` is what is decoded or computed
for a moment, of the largest linear, and what libraries allocate.
"""

from __future__ import annotations

import argparse
import ctypes
import multiprocessing
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mqat.checkpoints.random_weights import RandomWeights
from mqat.config import ModelConfig, OptimizerConfig
from mqat.models.adapters import Adapters
from mqat.models.decoder import DecoderConfig
from mqat.models.structure import DENSE_LINEARS, in_layer
from mqat.runtime import groups
from mqat.specs.policy import Policy

_M_MMAP_THRESHOLD = -3
# Name: algorithm, whether adapters are trained, whether they are merged, whether weights are packed.
WAYS = {
    "full": ("null", False, False, False),
    "QAT int4": ("int4", False, False, False),
    "QAT int8": ("int8_wo", False, False, False),
    "LoRA": ("null", True, False, False),
    "QAT int4 + LoRA": ("int4", True, False, False),
    "QAT int4 + LoRA, merged": ("int4", True, True, False),
    "QLoRA int4": ("int4", True, False, True),
    "QLoRA nf4": ("nf4", True, False, True),
}


LINEARS = [linear.name for linear in DENSE_LINEARS]


def llama(hidden: int, num_layers: int) -> DecoderConfig:
    """A model of nearly nothing but its layers' linears."""
    heads = hidden // 64
    return DecoderConfig(
        vocab_size=64, hidden_size=hidden, intermediate_size=4 * hidden, num_layers=num_layers,
        num_attention_heads=heads, num_query_groups=max(1, heads // 4), head_dim=64,
        tie_word_embeddings=True,
    )  # fmt: skip


SMALL = llama(256, 1)


def num_bytes(tensors: Iterable[Tensor | None]) -> int:
    """Of unique storages."""
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors if t is not None
    }
    return sum(storage.nbytes() for storage in storages.values())


def measure(
    model: DecoderConfig, rank: int, algorithm: str, adapts: bool, merges: bool, packs: bool
) -> dict[str, float]:
    """Bytes a weight, by what holds them."""
    from mqat.calibration.calibrate import calibrate
    from mqat.checkpoints.packed_backbone import load_packed_
    from mqat.checkpoints.pretrained import load_pretrained_
    from mqat.parallel.add_adapters import adapters_of, add_adapters_
    from mqat.parallel.linear import decoder_linears
    from mqat.parallel.quantized_step import quantized_step
    from mqat.specs.model import build_model
    from mqat.training.optimizer import build_optimizer, wrap_for_training

    layers = Policy(algorithm).schemes(model)
    built = build_model(model, ModelConfig(), layers, torch.bfloat16, is_packed=packs)
    source = RandomWeights(model, 1)
    load_pretrained_(built, source)
    if packs:
        load_packed_(built, source)
    if adapts:
        layers_of_model = range(model.num_layers)
        names = tuple(in_layer(i, x.name) for i in layers_of_model for x in DENSE_LINEARS)
        add_adapters_(built, Adapters(names, rank, 2.0 * rank, is_merged=merges))
    else:  # norms and tables are none of the table's rows
        built[0].requires_grad_(False)
        for linear in decoder_linears(built).values():
            linear.weight.requires_grad_(True)
    chunks = wrap_for_training(built)
    calibrate(chunks, lambda: None, group=torch.distributed.group.WORLD)
    optimizer, _ = build_optimizer(chunks, OptimizerConfig(), max_steps=1, clip_grad=1.0)
    tokens = torch.arange(8)[None] % model.vocab_size
    with quantized_step(chunks):
        chunks[0](tokens, tokens, None, labels=tokens).sum().backward()
        held = sum(
            x.weight_cache.num_bytes for x in decoder_linears(chunks).values() if x.weight_cache
        )
    optimizer.step()
    linears = decoder_linears(chunks).values()
    scales = [t for x in linears for q in x.quantizers.values() for t in q.frozen_tensors.values()]
    packed = sum(x.packed_weight.num_bytes for x in linears if x.packed_weight is not None)
    weights: list[Tensor] = [x.weight for x in linears if not packs]
    trained = [p for a in adapters_of(chunks).values() for p in a.parameters()]
    buffers = [b for chunk in chunks for b in chunk.buffers]
    parts: dict[str, Any] = {
        "weights": num_bytes([*weights, *scales]) + packed,
        "trained": num_bytes(trained),
        "gradients": num_bytes([b.grad_data for b in buffers]),
        "optimizer": num_bytes(
            [
                value
                for part in optimizer.chained_optimizers
                for state in part.optimizer.state.values()
                for value in state.values()
                if value.dim()
            ]
            + [
                main
                for part in optimizer.chained_optimizers
                for group in part.shard_fp32_from_float16_groups
                for main in group
            ]
        ),
        "of a step": held,
    }
    count = num_weights(model)
    return {name: size / count for name, size in parts.items()}


def num_weights(model: DecoderConfig) -> int:
    """Of the linears of all layers."""
    return model.num_layers * sum(a * b for a, b in map(model.linear_shape, LINEARS))


def resident(key: str) -> int:
    """Bytes of this process: `VmRSS`, now, or `VmHWM`, the most so far."""
    lines = Path("/proc/self/status").read_text("ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) * 1024


def measure_alone(results: Any, model: DecoderConfig, rank: int, how: tuple[Any, ...]) -> None:
    """Puts `measure` with the peak into a queue; in a process of its own."""
    # Tensors get pages of their own, so that what is freed is not kept for later by malloc.
    ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 18)
    groups.initialize()
    measure(SMALL, rank, *how)  # what libraries allocate once
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins again
    found = measure(model, rank, *how)
    found["together"] = sum(found.values())
    found["peak"] = (resident("VmHWM") - before) / num_weights(model)
    results.put(found)
    groups.finalize()


def main() -> None:
    """Prints a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--layers", type=int, default=4)
    args = parser.parse_args()
    model = llama(args.hidden, args.layers)
    names = ("weights", "trained", "gradients", "optimizer", "of a step", "together", "peak")
    print(f"| | {' | '.join(names)} |\n|---|{'---|' * len(names)}")
    context = multiprocessing.get_context("fork")
    for way, how in WAYS.items():
        results = context.SimpleQueue()
        process = context.Process(target=measure_alone, args=(results, model, args.rank, how))
        process.start()
        process.join()
        if process.exitcode:
            raise SystemExit(f"{way}: failed")
        found = results.get()
        print(f"| {way} | {' | '.join(f'{found[name]:.3f}' for name in names)} |", flush=True)


if __name__ == "__main__":
    main()

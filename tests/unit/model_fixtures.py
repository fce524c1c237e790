"""A tiny model on one process, calibrated: for tests of several rooms."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from mqat.checkpoints.random_weights import RandomWeights
from mqat.data.loader import Batches, Microbatch
from mqat.data.packing import PackedDataset
from mqat.models.decoder import DecoderConfig
from mqat.runtime import groups
from mqat.specs.policy import Policy

MODEL = DecoderConfig(
    vocab_size=301, hidden_size=128, intermediate_size=256, num_layers=2,
    num_attention_heads=4, num_query_groups=2, head_dim=32, tie_word_embeddings=True,
)  # fmt: skip


@pytest.fixture
def world() -> Iterator[None]:
    """Process groups of one process."""
    groups.initialize()
    yield
    groups.finalize()


def microbatches(count: int = 2, length: int = 32) -> list[dict[str, Any]]:
    """Random token sequences, two rows each."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 301, (count, 2, length + 1), generator=generator)
    return [
        {
            "tokens": t[:, :-1].contiguous(),
            "labels": t[:, 1:].contiguous(),
            "loss_mask": torch.ones(2, length),
            "position_ids": torch.arange(length).expand(2, length),
            "attention_mask": None,
        }
        for t in tokens
    ]


def padded_data(pad: int, *, rows: int = 4, length: int = 32, seed: int = 0) -> PackedDataset:
    """Conversations whose second half is padding with the token `pad`; the first quarter is a prompt."""
    half = length // 2
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.full((rows, length + 1), pad, dtype=torch.int32)
    tokens[:, :half] = torch.randint(0, 301, (rows, half), generator=generator, dtype=torch.int32)
    segments = torch.full((rows, length), -1, dtype=torch.int32)
    segments[:, :half] = 0
    counts = torch.zeros(rows, length, dtype=torch.bool)
    counts[:, half // 2 : half - 1] = True
    return PackedDataset(tokens, counts, segments)


def epoch(data: PackedDataset, **layout: int) -> list[list[Microbatch]]:
    """One pass in microbatches of two rows, filled up to batches of four."""
    sizes = {"global_batch_size": 4, "micro_batch_size": 2, "dp_rank": 0, "dp_size": 1} | layout
    return Batches(data, shuffle=False, seed=0, **sizes).epoch()


def without_masks(steps: list[list[Microbatch]]) -> list[list[Microbatch]]:
    """The same tokens, all of them taken for real: what a control compares with."""
    return [[batch | {"token_mask": None} for batch in step] for step in steps]


@pytest.fixture
def calibrated(world: None) -> Callable[..., list[Any]]:
    """`calibrated("int8")`: DDP-wrapped chunks of a tiny model with frozen scales.

    Scales are shrunk, so that inputs and weights are clipped here and there, and masks matter.
    """

    def make(
        algorithm: str,
        dtype: torch.dtype = torch.float32,
        recompute: str | None = None,
        model: DecoderConfig = MODEL,
    ) -> list[Any]:
        from megatron.core import parallel_state

        from mqat.calibration.calibrate import calibrate
        from mqat.checkpoints.pretrained import load_pretrained_
        from mqat.config import ModelConfig
        from mqat.evaluation.forward import evaluate
        from mqat.parallel.linear import quantized_linears
        from mqat.specs.model import build_model
        from mqat.training.optimizer import wrap_for_training

        layers = Policy(algorithm, group_size=64).schemes(model)
        settings = ModelConfig(activations_checkpoint_granularity=recompute)
        chunks = build_model(model, settings, layers, dtype)
        load_pretrained_(chunks, RandomWeights(model, 1, 0.1))
        chunks = wrap_for_training(chunks)
        if layers:
            group = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
            calibrate(chunks, lambda: evaluate(chunks, [microbatches()]), group=group)
        for linear in quantized_linears(chunks).values():
            for quantizer in linear.quantizers.values():
                frozen = quantizer.frozen_tensors
                if "scale" in frozen:
                    smaller = frozen["scale"] * 0.6
                    if quantizer.scheme.scale_dtype == torch.bfloat16:  # what engines hold
                        smaller = smaller.bfloat16().float()
                    frozen = frozen | {"scale": smaller}
                quantizer.load_(frozen)
        return chunks

    return make


def switch_off(chunks):
    """Every quantizer is the identity from now on."""
    from mqat.parallel.quantized_module import all_quantizers

    for quantizer in all_quantizers(chunks):
        quantizer.is_enabled = False

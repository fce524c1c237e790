"""The model, data and systems that the benchmarks compare; one process group per process."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

import torch

from mqat.checkpoints.random_weights import RandomWeights
from mqat.config import ModelConfig, OptimizerConfig
from mqat.models.decoder import DecoderConfig
from mqat.quant.algorithm import named_scheme
from mqat.runtime import groups
from mqat.specs.policy import Policy

ALGORITHMS = ("int8", "int4", "int4_w_int8_a", "fp8")


def systems_of(args: argparse.Namespace) -> list[tuple[str, str]]:
    """Name and algorithm of what is compared: Megatron's layers, mqat's unquantized ones, and QAT."""
    kinds = [("baseline", "null"), ("mqat", "null"), *(("mqat", a) for a in args.algorithms)]
    for backward in args.backward:
        own = [
            a for a in args.algorithms if named_scheme(a).weight.format.name.startswith(backward)
        ]
        kinds += [(f"mqat-{backward}", a) for a in own]
    return kinds + [("mqat-reference", a) for a in args.algorithms if args.reference]


@dataclass
class System:
    """One thing to measure: a trainable model with its optimizer."""

    name: str
    algorithm: str
    chunks: list[Any]
    optimizer: Any
    scheduler: Any


def arguments(description: str) -> argparse.ArgumentParser:
    """Options that all benchmarks share."""
    parser = argparse.ArgumentParser(description=description, conflict_handler="resolve")
    parser.add_argument("--algorithms", nargs="*", default=list(ALGORITHMS))
    parser.add_argument("--precision", choices=("bf16", "32"), default="32")
    parser.add_argument("--tokens", type=int, default=256, help="per microbatch")
    parser.add_argument("--microbatches", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=1024)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--pp", type=int, default=1)
    parser.add_argument("--sequence-parallel", action="store_true")
    parser.add_argument("--reference", action="store_true", help="also the fake-quantized path")
    parser.add_argument(
        "--backward", nargs="*", default=[], choices=("int8", "fp8"),
        help="also with gradients in 8 bits, of the algorithms that can",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true")
    return parser


def llama(args: argparse.Namespace) -> DecoderConfig:
    """Llama proportions: heads of 64, two query heads per group, MLP of 2.75 hidden sizes."""
    heads = args.hidden // 64
    return DecoderConfig(
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        intermediate_size=args.hidden * 11 // 4,
        num_layers=args.layers,
        num_attention_heads=heads,
        num_query_groups=heads // 2,
        head_dim=64,
        tie_word_embeddings=True,
    )


def batches(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Random tokens, one sequence per microbatch, on the device."""
    device = groups.device()
    generator = torch.Generator().manual_seed(0)
    shape = (args.microbatches, 1, args.tokens + 1)
    tokens = torch.randint(0, args.vocab, shape, generator=generator).to(device)
    return [
        {
            "tokens": t[:, :-1].contiguous(),
            "labels": t[:, 1:].contiguous(),
            "loss_mask": torch.ones(1, args.tokens, device=device),
            "position_ids": torch.arange(args.tokens, device=device)[None],
            "attention_mask": None,
        }
        for t in tokens
    ]


def calibrate_on(chunks: list[Any], data: list[dict[str, Any]]) -> None:
    """Freezes all scales on `data`."""
    from megatron.core import parallel_state

    from mqat.calibration.calibrate import calibrate
    from mqat.evaluation.forward import run_layers

    group = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
    calibrate(chunks, lambda: run_layers(chunks, [data]), group=group)


class TorchNorm:
    """`torch.nn.RMSNorm` as Megatron wraps it, but allowed under sequence parallelism."""

    def __new__(cls, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> Any:
        """Arguments as Megatron passes them."""
        made = torch.nn.RMSNorm(hidden_size, eps=eps, dtype=config.params_dtype)
        made.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return made


def megatron_layer_spec() -> Any:
    """What users train with on torch alone: Megatron's MLP and torch's norm; SDPA for its attention.

    SDPA instead of Megatron's own attention is in the baseline's favour: faster and smaller.
    """
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from mqat.specs.backend import SdpaAttention

    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = TorchNorm
    spec.submodules.self_attention.submodules.core_attention = SdpaAttention
    return spec


def te_model(model: DecoderConfig, settings: ModelConfig, dtype: torch.dtype) -> list[Any]:
    """Megatron's own `GPTModel` of Transformer Engine's layers; nothing of mqat computes in it.

    One chunk; weights are as Megatron draws them.
    """
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

    from mqat.specs.model import padded_vocab_size, transformer_config

    return [
        GPTModel(
            transformer_config(model, settings, dtype, spec_has_activation=False),
            get_gpt_layer_with_transformer_engine_spec(),
            vocab_size=padded_vocab_size(model),
            max_sequence_length=model.max_position_embeddings,
            pre_process=parallel_state.is_pipeline_first_stage(),
            post_process=parallel_state.is_pipeline_last_stage(),
            share_embeddings_and_output_weights=model.tie_word_embeddings,
            position_embedding_type="rope",
            rotary_base=model.rope_theta,
        )
    ]


def build(args: argparse.Namespace, name: str, algorithm: str) -> System:
    """A calibrated model and its optimizer.

    Args:
        args: From `arguments`.
        name: `baseline` (`megatron_layer_spec`), `transformer-engine` (`te_model`), `mqat`,
            `mqat-reference` (fake-quantized floats in Megatron's GEMM), `mqat-int8` or `mqat-fp8`
            (gradients in 8 bits).
        algorithm: `null` for unquantized.
    """
    from mqat.checkpoints.pretrained import load_pretrained_
    from mqat.parallel.backward_formats import FORMATS
    from mqat.parallel.linear import quantized_linears
    from mqat.parallel.low_precision_backward import set_backward_
    from mqat.specs.model import build_model
    from mqat.training.optimizer import build_optimizer, wrap_for_training

    model = llama(args)
    layers = Policy(algorithm).schemes(model)
    settings = ModelConfig(
        tensor_model_parallel_size=args.tp,
        pipeline_model_parallel_size=args.pp,
        sequence_parallel=args.sequence_parallel,
    )
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    chunks: list[Any]
    if name == "transformer-engine":
        chunks = te_model(model, settings, dtype)
    else:
        spec = megatron_layer_spec() if name == "baseline" else None
        chunks = list(build_model(model, settings, layers, dtype, layer_spec=spec))
        load_pretrained_(chunks, RandomWeights(model, 1, 0.02))
    chunks = wrap_for_training(chunks)
    if layers:
        calibrate_on(chunks, batches(args)[:1])
    for linear in quantized_linears(chunks).values():
        linear.is_reference = name == "mqat-reference"
    backward = name.removeprefix("mqat-")
    if backward in FORMATS:
        set_backward_(chunks, backward)
    optimizer, scheduler = build_optimizer(
        chunks, OptimizerConfig(lr=1e-5), max_steps=1000, clip_grad=1.0
    )
    return System(name, algorithm, chunks, optimizer, scheduler)


def start(args: argparse.Namespace) -> None:
    """Creates the process groups; then Megatron can be imported."""
    groups.initialize(tensor_parallel=args.tp, pipeline_parallel=args.pp)


def step(system: System, data: list[dict[str, Any]]) -> float:
    """One optimizer step; returns its loss per token."""
    from mqat.training.step import forward_backward

    for chunk in system.chunks:
        chunk.zero_grad_buffer()
    system.optimizer.zero_grad()
    sums = forward_backward(system.chunks, data)
    loss, tokens = sums["loss"], sums["tokens"]
    system.optimizer.step()
    system.scheduler.step(increment=1)
    return loss / tokens

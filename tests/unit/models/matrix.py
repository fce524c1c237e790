"""What a family can do, measured on a tiny random model of transformers: a row of docs/families.md."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from mqat.errors import UserError
from tests.unit.models.hf_models import CASES, SIZES, imported, transformers_model

STEPS, LENGTH, VOCABULARY = 20, 24, 97
LOGITS, GRADIENTS = 1e-3, 1e-3  # float32, other summation order


# Of families that are not in `CASES`, beside `SIZES`; new ones may need none.
KEYS: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": None},
    "qwen3": {"head_dim": 24},
    "gemma2": {"head_dim": 24, "query_pre_attn_scalar": 24, "sliding_window": 16},
    "gemma3_text": {"head_dim": 24, "query_pre_attn_scalar": 24, "sliding_window": 16},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16,
    },
    "qwen2_moe": {
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 48,
    },
    "glm4_moe": {
        "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16,
        "n_shared_experts": 1, "first_k_dense_replace": 1, "use_qk_norm": True,
    },
}  # fmt: skip


def model_of(family: str) -> Any:
    """A random model: the first of `CASES`, or of `KEYS`."""
    case = next((name for name in CASES if name.partition("-")[0] == family), None)
    if case is not None:
        return transformers_model(case)
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SIZES | KEYS.get(family, {}))
    model = AutoModelForCausalLM.from_config(config).float().eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.2 * torch.randn(parameter.shape)
    return model


def measure(family: str, folder: Path) -> dict[str, Any]:
    """Imports a random model, trains it in INT8 and exports it; process groups of one rank must exist.

    Returns:
        Largest differences from transformers, of logits and (relative, of a whole parameter) of
        gradients; loss before and after QAT; seconds of a processor; for each form of
        export `verified`, or `refused`.
    """
    started = time.process_time()
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, VOCABULARY, (2, LENGTH + 1), generator=generator)
    hf = model_of(family)
    hf.save_pretrained(folder / "hf")
    _, chunk = imported(folder / "hf")
    row: dict[str, Any] = compared(hf, chunk, tokens, folder)
    checkpoint, chunks, row["loss"] = trained(folder, tokens)
    row |= exported(checkpoint, chunks, tokens[:, :-1])
    return row | {"seconds": round(time.process_time() - started, 1)}


def compared(hf: Any, chunk: Any, tokens: torch.Tensor, folder: Path) -> dict[str, float]:
    """Differences from transformers, whose gradients are saved and read as if they were weights."""
    from mqat.evaluation.forward import logits

    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    expected = hf(inputs).logits
    apart = float((logits([chunk], inputs) - expected).detach().abs().max())
    torch.nn.functional.cross_entropy(expected.flatten(0, 1), labels.flatten()).backward()
    chunk(inputs, torch.arange(LENGTH).expand_as(inputs), None, labels=labels).mean().backward()
    for parameter in hf.parameters():
        parameter.data = parameter.grad
    hf.save_pretrained(folder / "gradients")
    _, wanted = imported(folder / "gradients")
    pairs = [
        (own.grad[:VOCABULARY], expected.detach()[:VOCABULARY])
        if name.endswith(("word_embeddings.weight", "output_layer.weight"))
        else (own.grad, expected.detach())
        for (name, own), expected in zip(chunk.named_parameters(), wanted.parameters(), strict=True)
    ]
    # What is zero but for rounding (biases of keys without rotation) is measured by the others.
    least = 1e-3 * max(float(expected.norm()) for _, expected in pairs)
    errors = [float((own - e).norm() / e.norm().clamp_min(least)) for own, e in pairs]
    return {"logits": apart, "gradients": max(errors)}


def trained(folder: Path, tokens: torch.Tensor) -> tuple[Path, list[Any], list[float]]:
    """A checkpoint after QAT in INT8 on one batch, the chunks, and the losses before and after."""
    from megatron.core import parallel_state

    from mqat.calibration.calibrate import calibrate
    from mqat.checkpoints.dist_checkpoint import save_checkpoint
    from mqat.checkpoints.huggingface import HuggingFaceCheckpoint
    from mqat.config import OptimizerConfig, QuantizationConfig
    from mqat.evaluation.forward import evaluate
    from mqat.specs.policy import Policy
    from mqat.training.optimizer import build_optimizer, wrap_for_training
    from mqat.training.step import forward_backward

    layers = Policy("int8").schemes(HuggingFaceCheckpoint(folder / "hf").config)
    description, chunk = imported(folder / "hf", layers)
    chunks = wrap_for_training([chunk])
    batch = {
        "tokens": tokens[:, :-1].contiguous(), "labels": tokens[:, 1:].contiguous(),
        "loss_mask": torch.ones(2, LENGTH), "position_ids": torch.arange(LENGTH).expand(2, LENGTH),
        "attention_mask": None,
    }  # fmt: skip
    group = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
    calibrate(chunks, lambda: evaluate(chunks, [[batch]]), group=group)

    def loss() -> float:
        total, count = evaluate(chunks, [[batch]])
        return total / count

    losses = [loss()]
    optimizer, scheduler = build_optimizer(
        chunks,
        OptimizerConfig(lr=2e-3),
        max_steps=STEPS,
        clip_grad=1.0,
        scales=QuantizationConfig(),
    )
    for step in range(STEPS):
        for trained_chunk in chunks:
            trained_chunk.zero_grad_buffer()
        optimizer.zero_grad()
        forward_backward(chunks, [batch], step=step)
        optimizer.step()
        scheduler.step(increment=1)
    losses.append(loss())
    path = folder / "checkpoint"
    save_checkpoint(path, chunks, model=description, layers=layers, algorithm="int8")
    return path, chunks, losses


def exported(checkpoint: Path, chunks: list[Any], tokens: torch.Tensor) -> dict[str, str]:
    """What becomes of the checkpoint in each form, read by `mqat verify` and run beside training."""
    from mqat.evaluation.forward import logits
    from mqat.export.export import export_hf, export_trtllm
    from mqat.verify.verify import verify_export

    reference, found = logits([chunk.module for chunk in chunks], tokens), {}

    def to_trtllm(out: Path) -> None:
        export_trtllm(checkpoint, out, tensor_parallel=2, pipeline_parallel=2, dtype="float32")

    def to_hf(out: Path) -> None:
        export_hf(checkpoint, out, dtype="float32")

    for name, export in (("trtllm", to_trtllm), ("hf", to_hf)):
        out = checkpoint.parent / f"exported-{name}"
        try:
            export(out)
        except UserError as error:
            assert str(error)
            found[name] = "refused"
            continue
        report = verify_export(out, reference=checkpoint, tokens=tokens, reference_logits=reference)
        assert report.problems == [], report.problems
        found[name] = "verified"
    return found

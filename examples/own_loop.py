"""Quantization-aware training in a loop of your own: Megatron's model, your data, your optimizer.

python examples/own_loop.py
torchrun --nproc-per-node 2 examples/own_loop.py        # tensor parallel

Only calls to `mqat` are new in it. A small model learns the bytes of Python's documentation,
unquantized; then it is calibrated, fine-tuned in INT8, saved, exported for TensorRT-LLM and verified.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from pydoc_data import topics

import torch
import torch.nn.functional as F  # noqa: N812

import mqat
from mqat.runtime.groups import command_line, is_main, world_size

LENGTH, BATCH, VOCABULARY = 128, 8, 256


def batches(text: bytes, seed: int) -> Iterator[dict[str, torch.Tensor]]:
    """Random pieces of a text, whose tokens are its bytes."""
    tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    generator = torch.Generator().manual_seed(seed)
    mask = torch.triu(torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool), diagonal=1)
    while True:
        first = torch.randint(len(tokens) - LENGTH - 1, (BATCH, 1), generator=generator)
        rows = tokens[first + torch.arange(LENGTH + 1)].to(torch.cuda.current_device())
        yield {
            "input_ids": rows[:, :-1].contiguous(),
            "labels": rows[:, 1:].contiguous(),
            "position_ids": torch.arange(LENGTH, device=rows.device).expand(BATCH, LENGTH),
            "attention_mask": mask.to(rows.device),  # True: not to be looked at
        }


def model_provider(described: mqat.DecoderConfig, schemes: dict) -> torch.nn.Module:
    """A GPTModel as Megatron-LM's users build it, with quantized linears in its layer spec."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=described.num_layers,
        hidden_size=described.hidden_size,
        ffn_hidden_size=described.intermediate_size,
        num_attention_heads=described.num_attention_heads,
        num_query_groups=described.num_query_groups,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        masked_softmax_fusion=False,
    )
    spec = mqat.quantize_block_spec(
        get_gpt_layer_local_spec(normalization="RMSNorm"),
        schemes,
        model=described,
        transformer_config=config,
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
    )
    return GPTModel(
        config,
        spec,
        vocab_size=VOCABULARY,
        max_sequence_length=LENGTH,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=True,
    )


def train(model: torch.nn.Module, data: Iterator, steps: int, lr: float) -> float:
    """Some optimizer steps; the mean loss of the last ten."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    losses = []
    for _ in range(steps):
        with mqat.quantized_step(model):  # weights are quantized once, for all microbatches
            loss = model(**next(data)).mean()
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return sum(losses[-10:]) / len(losses[-10:])


def main() -> None:
    """Trains, quantizes, fine-tunes, exports and verifies."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/own_loop"))
    parser.add_argument("--steps", type=int, default=150, help="of the unquantized training")
    parser.add_argument("--algorithm", default="int8")
    args = parser.parse_args()
    mqat.initialize(tensor_parallel=world_size())
    from megatron.core import parallel_state

    described = mqat.DecoderConfig(
        vocab_size=VOCABULARY, hidden_size=128, intermediate_size=384, num_layers=2,
        num_attention_heads=4, num_query_groups=2, head_dim=32, tie_word_embeddings=True,
        max_position_embeddings=LENGTH,
    )  # fmt: skip
    schemes = mqat.Policy(args.algorithm).schemes(described)
    model = model_provider(described, schemes).to(torch.cuda.current_device())
    data = batches("\n".join(topics.topics.values()).encode(), seed=0)
    unquantized = train(model, data, args.steps, lr=3e-3)  # quantizers are idle so far

    def calibration_set() -> None:
        for _ in range(4):
            model(**next(data))

    group = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
    mqat.calibrate(model, calibration_set, group=group)
    quantized = train(model, data, args.steps // 3, lr=3e-4)
    checkpoint, engine = args.out / "checkpoint", args.out / "trtllm"
    mqat.save_checkpoint(checkpoint, [model], layers=schemes, algorithm=args.algorithm)
    if is_main():
        mqat.export_trtllm(checkpoint, engine, tensor_parallel=1, overwrite=True)
        report = mqat.verify_export(engine, reference=checkpoint)
        print(f"loss: unquantized {unquantized:.3f}, then in {args.algorithm} {quantized:.3f}")
        print(f"{engine}: {report.headline()}")
    mqat.finalize()


if __name__ == "__main__":
    with command_line():
        main()

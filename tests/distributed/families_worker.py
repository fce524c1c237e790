"""Run by torchrun: several models at one layout: logits, and a calibrated checkpoint of each."""

import argparse
from pathlib import Path

import torch

from mqat.runtime import groups
from mqat.runtime.groups import command_line


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("models", type=Path, help="folder of Hugging Face directories")
    parser.add_argument("out", type=Path)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--pp", type=int, default=1)
    parser.add_argument("--sp", action="store_true")
    parser.add_argument("--ep", type=int, default=1)
    args = parser.parse_args()
    groups.initialize(tensor_parallel=args.tp, pipeline_parallel=args.pp, expert_parallel=args.ep)
    for model in sorted(args.models.iterdir()):
        result = one_model(model, args)
        if groups.is_main():
            torch.save(result, args.out / f"{model.name}.pt")
    groups.finalize()


def one_model(path: Path, args: argparse.Namespace) -> dict[str, torch.Tensor]:
    """Logits unquantized; then calibrates INT8, saves a checkpoint, and gives the logits again."""
    from megatron.core import parallel_state

    from mqat.calibration.calibrate import calibrate
    from mqat.checkpoints.dist_checkpoint import save_checkpoint
    from mqat.checkpoints.huggingface import HuggingFaceCheckpoint
    from mqat.checkpoints.pretrained import load_pretrained_
    from mqat.config import ModelConfig
    from mqat.evaluation.forward import evaluate, logits
    from mqat.specs.model import build_model
    from mqat.specs.policy import Policy

    source = HuggingFaceCheckpoint(path)
    settings = ModelConfig(
        tensor_model_parallel_size=args.tp, pipeline_model_parallel_size=args.pp,
        sequence_parallel=args.sp, expert_model_parallel_size=args.ep,
    )  # fmt: skip
    tokens = torch.load(path / "tokens.pt")
    batch = {
        "tokens": tokens, "labels": tokens, "loss_mask": torch.ones(tokens.shape),
        "position_ids": torch.arange(tokens.shape[1]).expand_as(tokens), "attention_mask": None,
    }  # fmt: skip
    layers = Policy("int8").schemes(source.config)
    found = {}
    for name, schemes in (("plain", {}), ("quantized", layers)):
        chunks = build_model(source.config, settings, schemes, torch.float32)
        load_pretrained_(chunks, source)
        if schemes:
            group = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
            calibrate(chunks, lambda c=chunks: evaluate(c, [[batch]]), group=group)
            save_checkpoint(
                args.out / path.name, chunks, model=source.config, layers=layers, algorithm="int8"
            )
        found[name] = logits(chunks, tokens).cpu()
    return found


if __name__ == "__main__":
    with command_line():
        main()

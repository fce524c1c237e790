"""Run by torchrun with two processes: a folder of models at every layout of two; saves the results."""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mqat.checkpoints.huggingface import HuggingFaceCheckpoint
from mqat.runtime import groups
from mqat.runtime.groups import command_line

LAYOUTS: dict[str, dict[str, Any]] = {
    "tp": {"tensor_model_parallel_size": 2},
    "tp+sp": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "pp": {"pipeline_model_parallel_size": 2},
    "cp": {"context_parallel_size": 2},
}


def losses(chunk: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Per-token losses [b, s] of whole sequences, of which each context-parallel rank has its part."""
    from megatron.core import parallel_state

    from mqat.parallel.context import own_tokens, whole_sequence

    group = parallel_state.get_context_parallel_group()
    labels = tokens.roll(-1, dims=1)
    places = torch.arange(tokens.shape[1]).expand_as(tokens)
    own, own_places, own_labels = (own_tokens(x, group) for x in (tokens, places, labels))
    found = chunk(own, own_places, None, labels=own_labels)
    return whole_sequence(found.t().contiguous(), group).t()


def main() -> None:
    folder = Path(sys.argv[1])
    tokens = torch.load(folder / "tokens.pt")
    results = {}
    for layout, sizes in LAYOUTS.items():
        groups.initialize(**{
            key.replace("_model", "").removesuffix("_size"): size
            for key, size in sizes.items() if key != "sequence_parallel"
        })  # fmt: skip
        from megatron.core import parallel_state

        from mqat.checkpoints.pretrained import load_pretrained_
        from mqat.config import ModelConfig
        from mqat.evaluation.forward import logits
        from mqat.specs.model import build_model

        for path in sorted(folder.glob("*/config.json")):
            source = HuggingFaceCheckpoint(path.parent)
            chunks = build_model(source.config, ModelConfig(**sizes), {}, torch.float32)
            load_pretrained_(chunks, source)
            with torch.no_grad():
                found = losses(chunks[0], tokens) if layout == "cp" else logits(chunks, tokens)
            results[layout, path.parent.name] = found.clone()
        parallel_state.destroy_model_parallel()
    if groups.is_main():
        torch.save(results, folder / "results.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    with command_line():
        main()

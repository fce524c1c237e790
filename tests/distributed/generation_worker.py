"""Run by torchrun with two processes: texts and scores of a model at every layout of two; saves them."""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mqat.checkpoints.huggingface import HuggingFaceCheckpoint
from mqat.runtime import groups
from mqat.runtime.groups import command_line

LAYOUTS: dict[str, dict[str, Any]] = {
    "dp": {},
    "tp": {"tensor_model_parallel_size": 2},
    "tp+sp": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "pp": {"pipeline_model_parallel_size": 2},
    "cp": {"context_parallel_size": 2},
    "vpp": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
}
PROMPTS = [[5, 9, 3, 20, 41, 7, 8, 2, 60, 11], [12], [7, 30, 1, 2, 3]]


class Numbers:
    """A tokenizer whose texts are numbers."""

    eos_token_id = 0

    def decode(self, tokens: list[int], **_: Any) -> str:
        return " ".join(map(str, tokens))


def texts(chunks: list[Any]) -> dict[str, Any]:
    """Greedy and sampled tokens, and scores of fixed continuations."""
    from mqat.evaluation.generation import Limits, generate
    from mqat.evaluation.sampling import Sampling
    from mqat.evaluation.scoring import Request, score
    from mqat.evaluation.text_model import MegatronText

    model, limits, found = MegatronText(chunks, Numbers()), Limits(8, ignores_end=True), {}
    for name, sampling in {
        "greedy": Sampling(), "seed 1": Sampling(1.0, seed=1), "seed 2": Sampling(1.0, seed=2)
    }.items():  # fmt: skip
        answers, _ = generate(model, PROMPTS, limits, sampling=sampling, batch_size=2)
        found[name] = [answer.tokens for answer in answers]
    requests = [Request(prompt, [4, 9]) for prompt in PROMPTS]
    found["scores"] = [score.total for score in score(model, requests, batch_size=2)]
    return found


def build(folder: Path, sizes: dict[str, Any]) -> list[Any]:
    """Of a Hugging Face directory."""
    from mqat.checkpoints.pretrained import load_pretrained_
    from mqat.config import ModelConfig
    from mqat.specs.model import build_model

    source = HuggingFaceCheckpoint(folder)
    chunks = build_model(source.config, ModelConfig(**sizes), {}, torch.float32)
    load_pretrained_(chunks, source)
    return chunks


def main() -> None:
    folder = Path(sys.argv[1])
    results = {}
    for layout, sizes in LAYOUTS.items():
        groups.initialize(**{
            key.replace("virtual_pipeline_model_parallel", "virtual_pipeline")
            .replace("_model", "").removesuffix("_size"): size
            for key, size in sizes.items() if key != "sequence_parallel"
        })  # fmt: skip
        from megatron.core import parallel_state

        results[layout] = texts(build(folder, sizes))
        parallel_state.destroy_model_parallel()
    torch.save(results, folder / f"results{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    with command_line():
        main()

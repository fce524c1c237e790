"""Greedy text from an mqat checkpoint (quantized as it was trained), a Hugging Face directory or GGUF.

torchrun --nproc-per-node 1 examples/gpt_generate.py runs/demo/checkpoint "The Moon is"
"""

import argparse
from pathlib import Path

import torch

from mqat.errors import UserError
from mqat.runtime import groups
from mqat.runtime.groups import command_line


def main() -> None:
    """Prints the prompt and its continuation from the first rank."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("prompt", nargs="+")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--tensor-parallel", type=int, default=1)
    parser.add_argument("--pipeline-parallel", type=int, default=1)
    parser.add_argument("--precision", choices=("bf16", "32"), default="32", help="to compute in")
    parser.add_argument("--lowered", action="store_true", help="run with low-precision weights")
    args = parser.parse_args()
    with command_line():
        from mqat.checkpoints.load_model import load_model
        from mqat.evaluation.generation import generate_greedy

        model = load_model(
            args.checkpoint,
            tensor_parallel=args.tensor_parallel,
            pipeline_parallel=args.pipeline_parallel,
            precision=args.precision,
            lowered=args.lowered,
        )
        if "" in args.prompt:
            raise UserError("the prompt is empty; give at least one word to continue.")
        for prompt in args.prompt:
            ids = torch.tensor([model.tokenizer(prompt)["input_ids"]])
            stop = model.tokenizer.eos_token_id
            answer = generate_greedy(model.chunks, ids, args.tokens, stop=stop)
            if groups.is_main():
                print(prompt + model.tokenizer.decode(answer, skip_special_tokens=True))
        groups.finalize()


if __name__ == "__main__":
    main()

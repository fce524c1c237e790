"""Greedy text from an mqat checkpoint (quantized as it was trained), a Hugging Face directory or GGUF.

torchrun --nproc-per-node 1 examples/gpt_generate.py runs/demo/checkpoint "The Moon is"

`mqat generate` does this and more: sampling, chats, stop strings, exported directories.
"""

import argparse
from pathlib import Path

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
        from mqat.evaluation.generation import Limits, generate, prompt_tokens
        from mqat.evaluation.text_model import open_text_model

        with open_text_model(
            args.checkpoint,
            tensor_parallel=args.tensor_parallel,
            pipeline_parallel=args.pipeline_parallel,
            precision=args.precision,
            lowered=args.lowered,
            keeps_weights=True,
        ) as model:
            prompts = [prompt_tokens(model.tokenizer, prompt) for prompt in args.prompt]
            answers, _ = generate(model, prompts, Limits(args.tokens))
        if groups.is_main():
            for prompt, answer in zip(args.prompt, answers, strict=True):
                print(prompt + answer.text)


if __name__ == "__main__":
    main()

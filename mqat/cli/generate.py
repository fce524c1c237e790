"""`mqat generate`: text from a checkpoint, a lowered model or an exported directory."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from mqat.cli.arguments import DEFAULT, add_layout, positive
from mqat.errors import UserError

if TYPE_CHECKING:
    from mqat.evaluation.generation import Generated

HELP = "text from a checkpoint, Hugging Face directory, GGUF or export, with a KV cache"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what the command takes."""
    parser.add_argument("model", type=Path)
    parser.add_argument("prompt", nargs="*")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="more prompts, one a line")
    parser.add_argument("--chat", action="store_true", help="prompts are a user's turn of a chat")
    parser.add_argument("--system", metavar="TEXT", help="with --chat: the system message")
    parser.add_argument("--max-tokens", type=positive, default=64, help=DEFAULT)
    parser.add_argument("--temperature", type=float, default=0.0, help=f"0: greedy; {DEFAULT}")
    parser.add_argument("--top-k", type=int, help="choose from the k likeliest tokens")
    parser.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        help=f"... from the fewest of that probability; {DEFAULT}",
    )
    parser.add_argument("--seed", type=int, default=0, help=DEFAULT)
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="ends an answer"
    )
    parser.add_argument("--batch-size", type=positive, default=8, help=DEFAULT)
    parser.add_argument(
        "--no-cache", action="store_true", help="compute all tokens again for each: a control"
    )
    add_layout(parser)
    parser.add_argument(
        "--precision", choices=("bf16", "32"), default="32", help=f"of a checkpoint; {DEFAULT}"
    )
    parser.add_argument("--lowered", action="store_true", help="run with low-precision weights")
    parser.add_argument(
        "--json", action="store_true", help="an object for each prompt, then the speed"
    )


def run(args: argparse.Namespace) -> None:
    """Prints what follows each prompt."""
    prompts = _prompts(args)
    from mqat.evaluation.sampling import Sampling

    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.seed)
    from mqat.evaluation.generation import Limits, generate, prompt_tokens
    from mqat.evaluation.text_model import open_text_model
    from mqat.runtime.groups import is_main

    limits = Limits(args.max_tokens, tuple(args.stop))
    with open_text_model(
        args.model,
        tensor_parallel=args.tensor_parallel,
        pipeline_parallel=args.pipeline_parallel,
        precision=args.precision,
        lowered=args.lowered,
        keeps_weights=True,
    ) as model:
        tokens = [
            prompt_tokens(model.tokenizer, text, chat=args.chat, system=args.system)
            for text in prompts
        ]
        answers, speed = generate(
            model, tokens, limits, sampling=sampling, batch_size=args.batch_size,
            cached=not args.no_cache,
        )  # fmt: skip
    if not is_main():
        return
    if args.json:
        for prompt, answer in zip(prompts, answers, strict=True):
            print(json.dumps({"prompt": prompt} | asdict(answer)))
        print(json.dumps({"speed": asdict(speed)}))
        return
    for prompt, answer in zip(prompts, answers, strict=True):
        print(f"> {prompt}\n{answer.text}\n" if args.chat else f"{prompt}{answer.text}\n")
    print(f"{speed}", file=sys.stderr)
    _say_how_ended(answers, args.stop, args.max_tokens)


def _prompts(args: argparse.Namespace) -> list[str]:
    prompts = list(args.prompt)
    if args.prompts is not None:
        prompts += [line for line in args.prompts.read_text("utf-8").splitlines() if line.strip()]
    if args.system is not None and not args.chat:
        raise UserError("--system goes with --chat: a system message is part of a chat.")
    if not prompts:
        raise UserError("no prompt; give some after the model, or --prompts with a file of them.")
    return prompts


def _say_how_ended(answers: Sequence["Generated"], stop: Sequence[str], most: int) -> None:
    """Which answers no end token and no stop string has ended."""
    cut = [n for n, answer in enumerate(answers, 1) if answer.ended_by not in ("end token", "stop")]
    if not cut:
        return
    numbers = ", ".join(map(str, cut))
    never = f"; none of {', '.join(map(repr, stop))} came" if stop else ""
    print(
        f"ended by --max-tokens {most} or max_position_embeddings: prompt {numbers}{never}",
        file=sys.stderr,
    )

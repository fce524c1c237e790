"""The `mqat` command: import, export, verify, eval, inspect, report, plan.

Every command checks its input first and exits with status 2 and one line on an error. `import` and
`export` also run under torchrun, where ranks share the work.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mqat.config import RunConfig, config_to_yaml, load_config
from mqat.errors import UserError
from mqat.runtime.groups import command_line

if TYPE_CHECKING:
    import torch

    from mqat.verify.verify import Report


def recipe_config(default: Path, description: str | None = None) -> RunConfig:
    """Configuration of an example script: `[--config FILE] [key=value ...]` from the command line."""
    parser = argparse.ArgumentParser(
        description=description,
        epilog="All keys, with their defaults:\n\n" + config_to_yaml(RunConfig()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, default=default, help=f"default: {default.name}")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args()
    return load_config(args.config, args.overrides)


def _import(args: argparse.Namespace) -> None:
    from mqat.checkpoints.dist_checkpoint import save_checkpoint
    from mqat.checkpoints.load_model import load_model
    from mqat.runtime import groups

    if args.out.exists():
        raise UserError(f"{args.out} exists already; choose another path, or delete it first.")
    model = load_model(
        args.source,
        tensor_parallel=args.tensor_parallel,
        pipeline_parallel=args.pipeline_parallel,
        precision=args.precision,
    )
    save_checkpoint(
        args.out,
        model.chunks,
        model=model.config,
        layers={},
        algorithm=None,
        tokenizer=model.tokenizer,
    )
    if groups.is_main():
        print(f"{args.out}: {model.config.num_layers} layers, {args.precision}")
    groups.finalize()


def _export(args: argparse.Namespace) -> None:
    from mqat.export.export import export_hf, export_trtllm

    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    together: dict[str, Any] = {"rank": rank, "world_size": world_size}
    if world_size > 1:
        from mqat.runtime.groups import join, raise_on_any_rank

        join("gloo")
        together["agree"] = raise_on_any_rank
    together |= {"dtype": args.dtype, "overwrite": args.overwrite}
    if args.format == "hf":
        if args.qnemo or args.inference_tp * args.inference_pp > 1:
            raise UserError(
                "--format hf: servers split the weights themselves, and a .qnemo holds a TensorRT-LLM "
                "directory; leave out --inference-tp, --inference-pp and --qnemo."
            )
        shard_bytes = int(args.max_shard_gb * 1e9)
        export_hf(
            args.checkpoint, args.out, style=args.style, max_shard_bytes=shard_bytes, **together
        )
        what = f"Hugging Face directory, {args.style}"
    else:
        export_trtllm(
            args.checkpoint,
            args.out,
            tensor_parallel=args.inference_tp,
            pipeline_parallel=args.inference_pp,
            allow_requantization=args.allow_requantization,
            archive=args.qnemo,
            **together,
        )
        what = f"TensorRT-LLM checkpoint, TP {args.inference_tp} x PP {args.inference_pp}"
    if rank == 0:
        print(
            f"{args.out}: {what}. "
            f"Check it with: mqat verify {args.out} --reference {args.checkpoint}"
        )


def _token_window(text: Path, tokenizer_dir: Path, length: int) -> torch.Tensor:
    """The first tokens of a text file, int64 [1, length]."""
    import torch

    from mqat.data.documents import ReadStats, read_texts
    from mqat.data.tokenizer import load_tokenizer

    document = read_texts([text], "error", ReadStats())[0]
    ids = load_tokenizer(tokenizer_dir)(document)["input_ids"][:length]
    if len(ids) < 2:
        raise UserError(f"{text}: has {len(ids)} tokens; at least 2 are needed.")
    return torch.tensor([ids])


def _verify(args: argparse.Namespace) -> None:
    from mqat.verify.verify import unpacked

    with unpacked(args.directory) as directory:
        report = _verified(directory, args)
    if args.json:
        print(json.dumps(report.to_dict(), indent=2))
    else:
        print(f"{args.directory}: {report.headline()}")
        for problem in report.problems[1:]:  # the headline has the first
            print(f"  {problem}")
    sys.exit(0 if report.ok else 1)


def _json_object(file: Path) -> dict[str, Any]:
    """Contents of a JSON file; empty if it is missing, which verification reports itself."""
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_text("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{file}: not valid JSON ({error}).") from error
    if not isinstance(value, dict):
        raise UserError(f"{file}: expected a JSON object, found {type(value).__name__}.")
    return value


def _verified(directory: Path, args: argparse.Namespace) -> Report:

    from mqat.checkpoints.reader import CheckpointReader
    from mqat.data.sample import NUM_TOKENS, sample_tokens
    from mqat.verify.verify import verify_export

    tokens = expected = None
    config = _json_object(directory / "config.json")
    if args.text is not None:
        tokens = _token_window(args.text, directory, args.tokens)
    elif config:
        tokens = sample_tokens(
            directory,
            vocab_size=config.get("vocab_size", 2),
            longest=config.get("max_position_embeddings", NUM_TOKENS),
        )
    if args.reference is not None and tokens is not None:
        from mqat.checkpoints.load_model import load_model
        from mqat.evaluation.forward import served_logits
        from mqat.runtime import groups

        dtype = config.get("torch_dtype", config.get("dtype", "float32"))
        if dtype not in ("bfloat16", "float16", "float32"):
            raise UserError(f"{directory / 'config.json'}: dtype={dtype!r} is not one mqat writes.")
        trained = CheckpointReader(args.reference).model.vocab_size
        if trained != config.get("vocab_size"):
            raise UserError(
                f"{args.reference}: has vocab_size={trained}, {directory} has "
                f"{config.get('vocab_size')}: this is not the checkpoint that was exported there."
            )
        model = load_model(args.reference)
        expected = served_logits(model.chunks, tokens, dtype).cpu()
        groups.finalize()
    return verify_export(
        directory, reference=args.reference, tokens=tokens, reference_logits=expected
    )


def _eval(args: argparse.Namespace) -> None:
    from mqat.evaluation.perplexity import checkpoint_perplexity, export_perplexity
    from mqat.verify.verify import is_export, unpacked

    if args.seq_length < 1:
        raise UserError(f"--seq-length={args.seq_length} must be at least 1.")
    is_archive = args.model.suffix == ".qnemo"
    with unpacked(args.model) if is_archive else nullcontext(args.model) as model:
        if is_export(model) and (args.lowered or args.precision != "32"):
            raise UserError(
                f"{args.model}: --lowered and --precision are for checkpoints; this is an export, "
                "which is computed in float32."
            )
        if args.compile and not args.lowered:
            raise UserError("--compile goes with --lowered: other models compute as they train.")
        if is_export(model):
            loss, tokens = export_perplexity(model, args.text, seq_length=args.seq_length)
        else:
            loss, tokens = checkpoint_perplexity(
                model, args.text, seq_length=args.seq_length, precision=args.precision,
                lowered=args.lowered, compiled=args.compile,
            )  # fmt: skip
    result = {"loss": loss, "perplexity": math.exp(loss), "tokens": tokens}
    if args.json:
        print(json.dumps(result))
    else:
        print(f"{args.model}: perplexity {result['perplexity']:.3f} over {tokens} tokens")


def _inspect(args: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    from mqat.evaluation.inspect import COLUMNS, rows
    from mqat.verify.verify import unpacked

    table = Table(*COLUMNS, title=str(args.path))
    with unpacked(args.path) as path:
        for row in rows(path):
            table.add_row(*row.cells())
    Console(width=160).print(table)


def _report(args: argparse.Namespace) -> None:
    from mqat.evaluation.perplexity import checkpoint_quality
    from mqat.report.page import check_plots, write_report
    from mqat.runtime import groups

    check_plots()
    if args.seq_length < 1:
        raise UserError(f"--seq-length={args.seq_length} must be at least 1.")
    report = checkpoint_quality(
        args.checkpoint,
        args.text,
        seq_length=args.seq_length,
        tensor_parallel=args.tensor_parallel,
        pipeline_parallel=args.pipeline_parallel,
    )
    if groups.is_main():
        write_report(report, args.out, f"{args.checkpoint}: quality by linear")
        print(f"{args.out / 'quality.html'}: {len(report['linears'])} linears")
    groups.finalize()


def _plan(args: argparse.Namespace) -> None:
    from mqat.plan.run import describe, make_plan, memory_estimate

    plan = make_plan(load_config(args.config, args.overrides), world_size=args.world_size)
    for key, value in (describe(plan) | memory_estimate(plan)).items():
        print(f"{key}: {value}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mqat", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(required=True, metavar="command")

    def command(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        added.set_defaults(run=run)
        return added

    default = "default: %(default)s"
    add = command("import", _import, "Hugging Face directory or GGUF -> dist-checkpoint")
    add.add_argument("source", type=Path)
    add.add_argument("--out", type=Path, required=True)
    add.add_argument("--precision", choices=("bf16", "32"), default="32", help=default)
    add.add_argument("--tensor-parallel", type=int, default=1, help=default)
    add.add_argument("--pipeline-parallel", type=int, default=1, help=default)

    add = command("export", _export, "checkpoint -> directory for serving")
    add.add_argument("checkpoint", type=Path)
    add.add_argument("--format", choices=("trtllm", "hf"), default="trtllm", help=default)
    add.add_argument("--inference-tp", type=int, default=1, help=f"trtllm; {default}")
    add.add_argument("--inference-pp", type=int, default=1, help=f"trtllm; {default}")
    add.add_argument(
        "--style", choices=("compressed-tensors", "modelopt"), default="compressed-tensors",
        help=f"hf: how quantized tensors are stored; {default}",
    )  # fmt: skip
    add.add_argument(
        "--max-shard-gb", type=float, default=5.0, help=f"hf: largest file, 1e9 bytes; {default}"
    )
    add.add_argument(
        "--qnemo", nargs="?", choices=("directory", "tar"), const="directory",
        help="trtllm: a .qnemo for NeMo, as a directory or (its older releases) as one file",
    )  # fmt: skip
    add.add_argument(
        "--allow-requantization", action="store_true",
        help="trtllm: accept that the loader rounds int8_wo weights a second time",
    )  # fmt: skip
    dtypes = ("bfloat16", "float16", "float32")
    add.add_argument(
        "--dtype", choices=dtypes, default="bfloat16", help=f"of unquantized tensors; {default}"
    )
    add.add_argument("--out", type=Path, required=True)
    add.add_argument("--overwrite", action="store_true", help="replace an earlier export")

    add = command(
        "verify", _verify, "check an exported directory; status 1 if it must not be served"
    )
    add.add_argument("directory", type=Path)
    add.add_argument("--reference", type=Path, help="the checkpoint it was exported from")
    add.add_argument(
        "--text", type=Path, help="UTF-8 text to run through both (default: one of its own)"
    )
    add.add_argument(
        "--tokens", type=int, default=128, help=f"tokens of the text to use; {default}"
    )
    add.add_argument("--json", action="store_true")

    add = command("eval", _eval, "token perplexity of a checkpoint or an exported directory")
    add.add_argument("model", type=Path)
    add.add_argument("--text", type=Path, required=True)
    add.add_argument("--seq-length", type=int, default=256, help=default)
    add.add_argument(
        "--precision", choices=("bf16", "32"), default="32", help=f"of a checkpoint; {default}"
    )
    add.add_argument("--lowered", action="store_true", help="run with low-precision weights")
    add.add_argument(
        "--compile", action="store_true", help="with --lowered: torch.compile, which takes a while"
    )
    add.add_argument("--json", action="store_true")

    add = command("inspect", _inspect, "formats, bits and scales of a checkpoint or an export")
    add.add_argument("path", type=Path)

    add = command("report", _report, "signal to noise, clipping and outliers of every linear")
    add.add_argument("checkpoint", type=Path)
    add.add_argument("--text", type=Path, required=True)
    add.add_argument(
        "--out", type=Path, required=True, help="directory for quality.json, quality.html"
    )
    add.add_argument("--seq-length", type=int, default=256, help=default)
    add.add_argument("--tensor-parallel", type=int, default=1, help=default)
    add.add_argument("--pipeline-parallel", type=int, default=1, help=default)

    add = command("plan", _plan, "check a configuration and estimate memory before queueing a job")
    add.add_argument("--config", type=Path, required=True)
    add.add_argument("--world-size", type=int, required=True)
    add.add_argument("overrides", nargs="*", metavar="key=value")
    return parser


def main() -> None:
    """Entry point of the `mqat` script."""
    args = _parser().parse_args()
    with command_line():
        args.run(args)


if __name__ == "__main__":
    main()

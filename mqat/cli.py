"""The `mqat` command: import, export, verify, eval, inspect, plan.

Every command checks its input first and exits with status 2 and one line on an error. `import` and
`export` also run under torchrun, where ranks share the work.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mqat.config import RunConfig, config_to_yaml, load_config
from mqat.runtime.groups import command_line

if TYPE_CHECKING:
    import torch


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
    from mqat.runtime import groups
    from mqat.training.checkpoint import save_checkpoint
    from mqat.training.opened import open_model

    if args.out.exists():
        raise ValueError(f"{args.out} exists already; choose another path, or delete it first.")
    model = open_model(
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
    from mqat.export import export_trtllm

    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    agree = {}
    if world_size > 1:
        import torch.distributed as dist

        from mqat.runtime.groups import agree as agree_

        dist.init_process_group("gloo")
        agree = {"agree": agree_}
    export_trtllm(
        args.checkpoint,
        args.out,
        tensor_parallel=args.inference_tp,
        pipeline_parallel=args.inference_pp,
        dtype=args.dtype,
        overwrite=args.overwrite,
        rank=rank,
        world_size=world_size,
        **agree,
    )
    if rank == 0:
        print(
            f"{args.out}: TensorRT-LLM checkpoint, TP {args.inference_tp} x PP {args.inference_pp}. "
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
        raise ValueError(f"{text}: has {len(ids)} tokens; at least 2 are needed.")
    return torch.tensor([ids])


def _verify(args: argparse.Namespace) -> None:
    import torch

    from mqat.verify import verify_trtllm

    tokens = expected = None
    config_file = args.directory / "config.json"
    if args.text is not None:
        tokens = _token_window(args.text, args.directory, args.tokens)
    elif config_file.is_file():
        # No text given: a fixed spread of token ids still exercises every tensor.
        vocab = json.loads(config_file.read_text("utf-8")).get("vocab_size", 2)
        tokens = torch.arange(32)[None] * 7919 % vocab
    if args.reference is not None and tokens is not None:
        from mqat.runtime import groups
        from mqat.training.opened import open_model
        from mqat.training.step import served_logits

        dtype = json.loads(config_file.read_text("utf-8")).get("dtype", "float32")
        model = open_model(args.reference)
        expected = served_logits(model.chunks, tokens, dtype).cpu()
        groups.finalize()
    report = verify_trtllm(
        args.directory, reference=args.reference, tokens=tokens, reference_logits=expected
    )
    if args.json:
        print(json.dumps(report.to_dict(), indent=2))
    else:
        print(f"{args.directory}: {report.headline()}")
        for problem in report.problems:
            print(f"  {problem}")
    sys.exit(0 if report.ok else 1)


def _eval(args: argparse.Namespace) -> None:
    from mqat.training.perplexity import checkpoint_perplexity, export_perplexity

    if args.seq_length < 1:
        raise ValueError(f"--seq-length={args.seq_length} must be at least 1.")

    is_export = any(args.model.glob("rank*.safetensors")) if args.model.is_dir() else False
    measure = export_perplexity if is_export else checkpoint_perplexity
    loss, tokens = measure(args.model, args.text, seq_length=args.seq_length)
    result = {"loss": loss, "perplexity": math.exp(loss), "tokens": tokens}
    if args.json:
        print(json.dumps(result))
    else:
        print(f"{args.model}: perplexity {result['perplexity']:.3f} over {tokens} tokens")


def _inspect(args: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    from mqat.export.slices import CheckpointReader

    reader = CheckpointReader(args.checkpoint)
    table = Table(title=str(args.checkpoint))
    for column in (
        "linear",
        "shape",
        "algorithm",
        "weight",
        "bits",
        "weight scales",
        "input scale",
    ):
        table.add_column(column)
    for name, scheme in reader.layers.items():
        assert scheme.weight is not None
        scale = reader.read(f"quantizers.{name}.weight_scale")
        shape = reader.model.linear_shape(name.split(".", 3)[3])
        bits = scheme.weight.format.bits + 32 * scale.numel() / (shape[0] * shape[1])
        step = (
            f"{reader.read(f'quantizers.{name}.input_scale').item():.4g}" if scheme.input else "-"
        )
        table.add_row(
            name,
            "x".join(map(str, shape)),
            scheme.name,
            f"{scheme.weight.format.name} per {scheme.weight.granularity}",
            f"{bits:.2f}",
            f"{scale.min():.3g} .. {scale.max():.3g}",
            step,
        )
    if not reader.layers:
        table.caption = "unquantized"
    Console(width=140).print(table)


def _plan(args: argparse.Namespace) -> None:
    from mqat.training.plan import describe, make_plan, memory_estimate

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

    add = command("import", _import, "Hugging Face directory or GGUF -> dist-checkpoint")
    add.add_argument("source", type=Path)
    add.add_argument("--out", type=Path, required=True)
    add.add_argument("--precision", choices=("bf16", "32"), default="32")
    add.add_argument("--tensor-parallel", type=int, default=1)
    add.add_argument("--pipeline-parallel", type=int, default=1)

    add = command("export", _export, "checkpoint -> directory for serving")
    add.add_argument("checkpoint", type=Path)
    add.add_argument("--format", choices=("trtllm",), default="trtllm")
    add.add_argument("--inference-tp", type=int, default=1)
    add.add_argument("--inference-pp", type=int, default=1)
    dtypes = ("bfloat16", "float16", "float32")
    add.add_argument("--dtype", choices=dtypes, default="bfloat16")
    add.add_argument("--out", type=Path, required=True)
    add.add_argument("--overwrite", action="store_true")

    add = command(
        "verify", _verify, "check an exported directory; status 1 if it must not be served"
    )
    add.add_argument("directory", type=Path)
    add.add_argument("--reference", type=Path, help="the checkpoint it was exported from")
    add.add_argument("--text", type=Path, help="UTF-8 text to run through both")
    add.add_argument("--tokens", type=int, default=128, help="tokens of the text to use")
    add.add_argument("--json", action="store_true")

    add = command("eval", _eval, "token perplexity of a checkpoint or an exported directory")
    add.add_argument("model", type=Path)
    add.add_argument("--text", type=Path, required=True)
    add.add_argument("--seq-length", type=int, default=256)
    add.add_argument("--json", action="store_true")

    add = command("inspect", _inspect, "schemes, scales and bits per weight of a checkpoint")
    add.add_argument("checkpoint", type=Path)

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

"""`mqat export`: a checkpoint becomes a directory for serving, also under torchrun."""

import argparse
import os
from pathlib import Path
from typing import Any

from mqat.cli.arguments import DEFAULT
from mqat.errors import UserError

HELP = "checkpoint -> directory for serving"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what the command takes."""
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--format", choices=("trtllm", "hf"), default="trtllm", help=DEFAULT)
    parser.add_argument("--inference-tp", type=int, default=1, help=f"trtllm; {DEFAULT}")
    parser.add_argument("--inference-pp", type=int, default=1, help=f"trtllm; {DEFAULT}")
    parser.add_argument(
        "--style", choices=("compressed-tensors", "modelopt"), default="compressed-tensors",
        help=f"hf: how quantized tensors are stored; {DEFAULT}",
    )  # fmt: skip
    parser.add_argument(
        "--max-shard-gb", type=float, default=5.0, help=f"hf: largest file, 1e9 bytes; {DEFAULT}"
    )
    parser.add_argument(
        "--qnemo", nargs="?", choices=("directory", "tar"), const="directory",
        help="trtllm: a .qnemo for NeMo, as a directory or (its older releases) as one file",
    )  # fmt: skip
    parser.add_argument(
        "--allow-requantization", action="store_true",
        help="trtllm: accept that the loader rounds int8_wo weights a second time",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16",
        help=f"of unquantized tensors; {DEFAULT}",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")


def run(args: argparse.Namespace) -> None:
    """Exports `args.checkpoint`."""
    from mqat.export.export import export_hf, export_trtllm

    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    together: dict[str, Any] = {"rank": rank, "world_size": world_size}
    if world_size > 1:
        from mqat.runtime.groups import join, raise_on_any_rank

        join("gloo")
        together["raise_on_any_rank"] = raise_on_any_rank
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

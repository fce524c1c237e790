"""`mqat export`: a checkpoint becomes a directory for serving, also under torchrun."""

import argparse
from pathlib import Path
from typing import Any

from mqat.cli.arguments import DEFAULT, positive

HELP = "checkpoint -> directory for serving, or .nemo"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what the command takes."""
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument(
        "--format", default="trtllm", help=f"trtllm, hf, gguf, nemo or peft; {DEFAULT}"
    )
    parser.add_argument("--inference-tp", type=positive, default=1, help=f"trtllm; {DEFAULT}")
    parser.add_argument("--inference-pp", type=positive, default=1, help=f"trtllm; {DEFAULT}")
    parser.add_argument(
        "--style",
        help="hf: how quantized tensors are stored, compressed-tensors (default) or modelopt",
    )
    parser.add_argument(
        "--max-shard-gb", type=float, help="hf: largest file, 1e9 bytes (default: 5)"
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
        "--dtype",
        default="bfloat16",
        help=f"of unquantized tensors: or float16, float32; {DEFAULT}",
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")


def run(args: argparse.Namespace) -> None:
    """Exports `args.checkpoint`."""
    import torch.distributed as dist

    from mqat.export.export import export_checkpoint
    from mqat.export.exporter import ExportOptions
    from mqat.export.exporters import exporter
    from mqat.runtime import groups

    target, together = exporter(args.format, args.style), dict[str, Any]()
    if groups.world_size() > 1:
        groups.join("gloo")
        together = {
            "rank": dist.get_rank(),
            "world_size": groups.world_size(),
            "raise_on_any_rank": groups.raise_on_any_rank,
        }
    options = ExportOptions(
        args.inference_tp,
        args.inference_pp,
        args.dtype,
        args.allow_requantization,
        args.qnemo,
        None if args.max_shard_gb is None else int(args.max_shard_gb * 1e9),
    )
    export_checkpoint(target, args.checkpoint, args.out, options, args.overwrite, **together)
    if groups.is_main():
        form = target.format if target.style is None else f"{target.format}, {target.style}"
        check = f"Check it with: mqat verify {args.out} --reference {args.checkpoint}"
        if target.format == "peft":
            check += " --base HF_DIR"
        if target.format == "gguf":  # llama.cpp computes with a rounding of its own
            check = f"Run it with: llama-cli -m {args.out / 'model.gguf'}"
        print(f"{args.out}: {form}. {check}")

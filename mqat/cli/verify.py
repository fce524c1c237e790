"""`mqat verify`: an exported directory is checked, run, and compared with its checkpoint."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from mqat.cli.arguments import DEFAULT, positive
from mqat.errors import UserError

if TYPE_CHECKING:
    import torch

    from mqat.verify.report import Report


HELP = "check an exported directory; status 1 if it must not be served"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what the command takes."""
    parser.add_argument("directory", type=Path)
    parser.add_argument("--reference", type=Path, help="the checkpoint it was exported from")
    parser.add_argument(
        "--base", type=Path, help="of adapters: Hugging Face directory on which they are run"
    )
    parser.add_argument(
        "--text", type=Path, help="UTF-8 text to run through both (default: one of its own)"
    )
    parser.add_argument(
        "--tokens", type=positive, default=128, help=f"tokens of the text to use; {DEFAULT}"
    )
    parser.add_argument("--json", action="store_true")


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


def _verified(directory: Path, args: argparse.Namespace) -> Report:
    from mqat.checkpoints.reader import CheckpointReader
    from mqat.data.sample import sample_tokens
    from mqat.verify.verify import read_model, verify_export

    tokens, served = None, read_model(directory)
    if args.text is not None:
        tokens = _token_window(args.text, directory, args.tokens)
    elif served is not None:
        tokens = sample_tokens(
            directory,
            vocab_size=served.value("vocab_size"),
            longest=served.value("max_position_embeddings"),
        )
    if args.reference is None or tokens is None or served is None:
        return verify_export(directory, reference=args.reference, tokens=tokens)
    trained, vocab = CheckpointReader(args.reference).model.vocab_size, served.value("vocab_size")
    if trained != vocab:
        raise UserError(
            f"{args.reference}: has vocab_size={trained}, {directory} has {vocab}: "
            "this is not the checkpoint that was exported there."
        )
    from mqat.checkpoints.load_model import load_model
    from mqat.runtime import groups

    model = load_model(args.reference)
    # Megatron can be imported only after the groups' device is prepared.
    from mqat.evaluation.verification import verify_with_model

    report = verify_with_model(
        directory, args.reference, model.chunks, tokens, served.value("dtype"), is_rebuilt=True
    )
    groups.finalize()
    return report


def _verified_adapter(args: argparse.Namespace) -> Report:
    """Of adapters, on a base model where there is one; with the checkpoint against its own logits."""
    from mqat.data.sample import sample_tokens
    from mqat.verify.verify import read_model, verify_adapter

    served = None if args.base is None else read_model(args.base)
    if args.base is None or args.reference is None or served is None:
        return verify_adapter(args.directory, base=args.base, reference=args.reference)
    tokens = sample_tokens(
        args.directory,
        vocab_size=served.value("vocab_size"),
        longest=served.value("max_position_embeddings"),
    )
    if args.text is not None:
        tokens = _token_window(args.text, args.directory, args.tokens)
    from mqat.checkpoints.load_model import load_model
    from mqat.runtime import groups

    model = load_model(args.reference)
    # Megatron can be imported only after the groups' device is prepared.
    from mqat.evaluation.verification import verify_adapter_with_model

    report = verify_adapter_with_model(
        args.directory, args.base, args.reference, model.chunks, tokens, served.value("dtype")
    )
    groups.finalize()
    return report


def _verified_nemo(args: argparse.Namespace) -> Report:
    if args.text is not None:
        raise UserError(
            f"{args.directory}: a .nemo holds weights to train on, which are compared, not run; leave "
            "out --text. mqat import reads it back, to evaluate it."
        )
    from mqat.evaluation.nemo_archive import verify_nemo

    return verify_nemo(args.directory, args.reference)


def _check_path(path: Path) -> None:
    """Refuses what is no export at all; a damaged one is the report's."""
    from mqat.checkpoints.manifest import DESCRIPTION

    if not path.exists():
        raise UserError(f"{path}: no such file or directory; name what mqat export wrote.")
    if (path / DESCRIPTION).is_file():
        raise UserError(
            f"{path}: is a checkpoint, of which mqat export makes a directory for serving. To compare "
            f"both: mqat verify DIR --reference {path}"
        )
    if path.suffix == ".gguf" or any(path.glob("*.gguf")):
        raise UserError(
            f"{path}: is for llama.cpp, whose rounding of inputs no reader here has. To see what was "
            "written: mqat import FILE.gguf, then mqat eval. To compare servers: make test-serve."
        )
    if path.is_dir() and not any(path.glob("config.json")) and not any(path.rglob("*.safetensors")):
        raise UserError(
            f"{path}: holds no export (no config.json and no *.safetensors); name what mqat export "
            "wrote."
        )


def run(args: argparse.Namespace) -> None:
    """Verifies `args.directory`; the exit status is 1 if it must not be served."""
    from mqat.checkpoints.archive import unpacked
    from mqat.verify.adapter import CONFIG

    _check_path(args.directory)
    is_adapter = (args.directory / CONFIG).is_file()
    if args.base is not None and not is_adapter:
        raise UserError(f"{args.directory}: holds no {CONFIG}; --base is for adapters alone.")
    if args.directory.suffix == ".nemo":
        report = _verified_nemo(args)
    elif is_adapter:
        report = _verified_adapter(args)
    else:
        with unpacked(args.directory) as directory:
            report = _verified(directory, args)
    if args.json:
        print(json.dumps(report.to_dict(), indent=2))
    else:
        print(f"{args.directory}: {report.headline()}")
        for line in [*report.problems[1:], *report.lines()]:  # the headline has the first
            print(f"  {line}")
    sys.exit(0 if report.ok else 1)

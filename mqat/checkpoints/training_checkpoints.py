"""Finds weights, description and tokenizer in what Megatron-LM, Megatron-Bridge and NeMo save.

| saved by           | looks like                                                                     |
|--------------------|--------------------------------------------------------------------------------|
| Megatron-LM        | `latest_checkpointed_iteration.txt`, `iter_0000100/`: `.metadata`, `common.pt` |
| Megatron-Bridge    | the same, with `run_config.yaml`                                               |
| dist_checkpointing | `.metadata`; a Hugging Face `config.json` has to describe the model            |
| NeMo 2             | `context/model.yaml`, `weights/`                                               |
| NeMo 1             | `.nemo` (tar, gzip, unpacked): `model_config.yaml`, `model_weights/`, tokenizer |

Sources: Megatron-LM `megatron/training/checkpointing.py`; NeMo `nemo/lightning/ckpt_utils.py`,
`nemo/collections/nlp/parts/nlp_overrides.py` (NLPSaveRestoreConnector) and
`nemo/core/connectors/save_restore_connector.py`.
"""

from __future__ import annotations

import argparse
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from mqat.checkpoints.folder import Folder
from mqat.checkpoints.hf_config import decoder_config
from mqat.checkpoints.huggingface import read_json
from mqat.checkpoints.megatron import MegatronCheckpoint, check_family
from mqat.checkpoints.megatron_config import Stored, TrainingConfig
from mqat.checkpoints.nemo_tokenizer import nemo1_tokenizer, nemo2_tokenizer
from mqat.checkpoints.rank_folders import RankFolders, has_rank_folders
from mqat.checkpoints.records import MappedFile
from mqat.checkpoints.torch_dist import INDEX, TorchDist
from mqat.checkpoints.training_words import (
    from_megatron_lm,
    from_nemo1,
    from_transformer_config,
)
from mqat.data.strict_json import parse_json
from mqat.errors import UserError
from mqat.models.decoder import DecoderConfig

_LATEST = "latest_checkpointed_iteration.txt"
_COMMON, _FORMAT, _BRIDGE = "common.pt", "metadata.json", "run_config.yaml"
_COMMON_OBJECT = "common_state/shard_0_1"
_NEMO1, _NEMO2 = "model_config.yaml", "context/model.yaml"
_RANK_FILE = "model_weights.ckpt"
Describe = Callable[[Stored], DecoderConfig]
Tokenizer = Path | TemporaryDirectory[str] | None


def is_training_checkpoint(path: Path) -> bool:
    """Whether one of the above is there."""
    if path.is_file():
        return path.suffix == ".nemo" or tarfile.is_tarfile(path)
    names = [_LATEST, INDEX, _NEMO1, _NEMO2, "context/io.json"]
    if not (path / "config.json").is_file():  # Hugging Face's, beside metadata of somebody else
        names.append(_FORMAT)
    return any((path / name).exists() for name in names) or any(path.glob("*p_rank_*"))


def open_training_checkpoint(
    path: Path, *, config_from: Path | None, tokenizer: Path | None
) -> MegatronCheckpoint:
    """Opens one of the above.

    Args:
        path: Its file or directory.
        config_from: Hugging Face directory whose `config.json` describes the model instead.
        tokenizer: Directory of the tokenizer to take instead.

    Raises:
        UserError: Something is missing, damaged, in a form that is not read, or not honoured.
    """
    folder = Folder(path)
    if folder.has(_NEMO1):
        parts = _nemo1(folder, config_from)
    elif folder.has("context"):
        parts = _nemo2(folder, config_from)
    else:
        parts = _megatron(_iteration(folder), config_from)
    tensors, config, found = parts
    describe, said_by = _description(config, config_from)
    if config_from is not None and any(config_from.glob("tokenizer*")):
        found = config_from
    return MegatronCheckpoint(path, tensors, describe, said_by, tokenizer or found)


Parts = tuple[TorchDist | RankFolders, TrainingConfig | None, Tokenizer]


def _description(config: TrainingConfig | None, config_from: Path | None) -> tuple[Describe, str]:
    if config_from is not None:
        model, said_by = (
            decoder_config(read_json(config_from / "config.json")),
            config_from / "config.json",
        )
        check_family(model.architecture, said_by)
        if config is not None:
            config.check_is(model, str(said_by))
        return lambda _: model, str(said_by)
    assert config is not None
    return config.describe, config.where


def _iteration(folder: Folder) -> Folder:
    """The folder of the latest iteration, or the folder itself."""
    if not folder.has(_LATEST):
        return folder
    text = folder.read(_LATEST).decode("ascii", "replace").strip()
    if text != "release" and not text.isdigit():
        raise UserError(
            f"{folder.path / _LATEST}: says {text[:40]!r}, must be a number or 'release'."
        )
    name = text if text == "release" else f"iter_{int(text):07d}"
    if not folder.has(name):
        raise UserError(
            f"{folder.path}: {_LATEST} says {text}, but there is no {name}; name the folder of another "
            "iteration."
        )
    return folder.inside(name)


def _torch_dist(folder: Folder) -> TorchDist:
    """The tensors of a distributed checkpoint; other forms are refused by name."""
    where = folder.path
    if folder.has(_FORMAT):
        try:
            form = parse_json(folder.read(_FORMAT))["sharded_backend"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{where}: {_FORMAT} is damaged ({error!r}).") from error
        if form != "torch_dist":
            raise UserError(
                f"{where}: is a distributed checkpoint in the format {form!r}; only torch_dist is read. "
                "Save it again as torch_dist (Megatron-LM: --dist-ckpt-format torch_dist; NeMo 1: "
                "model.dist_ckpt_format=torch_dist)."
            )
    if not folder.has(INDEX) and has_rank_folders(folder):
        raise UserError(
            f"{where}: holds a state dict of each rank; convert it with Megatron-LM "
            "(--ckpt-convert-format torch_dist --ckpt-convert-save DIR) and import that."
        )
    return TorchDist(folder)


def _megatron(folder: Folder, config_from: Path | None) -> Parts:
    tensors = _torch_dist(folder)
    config, tokenizer = None, folder.path / "tokenizer"
    found: Tokenizer = tokenizer if tokenizer.is_dir() else None
    if folder.has(_BRIDGE):
        model = _yaml(folder, _BRIDGE).get("model")
        said = _mapping(folder, _BRIDGE, "model", model)
        config = from_transformer_config(said, f"{folder.path / _BRIDGE}")
        return tensors, config, found
    try:
        args = _args(folder, tensors)
    except UserError:
        if config_from is None:
            raise
        return tensors, None, found  # they say nothing that could contradict the description
    config = from_megatron_lm(args, f"args in {folder.path / _COMMON}")
    return tensors, config, found or _local(args)


def _args(folder: Folder, tensors: TorchDist) -> dict[str, Any]:
    """The arguments of the run that saved a checkpoint.

    Raises:
        UserError: None are there, or they cannot be read without running code.
    """
    by_hand = (
        "say what the model is with mqat import --config-from HF_DIR, a Hugging Face directory with its "
        "config.json"
    )
    try:
        if folder.has(_COMMON):
            place = folder.place(_COMMON)
            common = MappedFile(place.file).load(place.start, place.length)
        else:  # since Megatron-Core 0.19, a list of one
            (common,) = tensors.load_object(_COMMON_OBJECT) or [None]
    except UserError:  # a file is missing
        raise
    except Exception as error:  # damaged pickles raise nearly anything
        raise UserError(
            f"{folder.path / _COMMON}: cannot be read without running code that it names ({error}); "
            f"{by_hand}."
        ) from error
    args = common.get("args") if isinstance(common, dict) else None
    if not isinstance(args, argparse.Namespace):
        raise UserError(
            f"{folder.path / _COMMON}: has no args, which Megatron-LM saves there; {by_hand}."
        )
    return vars(args)


def _local(args: Mapping[str, Any]) -> Path | None:
    """The tokenizer that a run was given, if it is a directory of this machine."""
    given = args.get("tokenizer_model")
    path = Path(given) if isinstance(given, str) and given else None
    if path is not None and path.name == "tokenizer.model":
        path = path.parent
    return path if path is not None and path.is_dir() else None


def _nemo2(folder: Folder, config_from: Path | None) -> Parts:
    tensors = _torch_dist(folder.inside("weights"))
    where = f"{folder.path / _NEMO2}"
    if not folder.has(_NEMO2):
        if config_from is None:
            raise UserError(
                f"{where}: is missing, and context/io.json alone is not read; say what the model is "
                "with mqat import --config-from HF_DIR."
            )
        return tensors, None, None
    said = _yaml(folder, _NEMO2)
    config = from_transformer_config(_mapping(folder, _NEMO2, "config", said.get("config")), where)
    return tensors, config, nemo2_tokenizer(folder, said.get("tokenizer"))


def _nemo1(folder: Folder, config_from: Path | None) -> Parts:
    said = _yaml(folder, _NEMO1)
    config = from_nemo1(said, f"{folder.path}: {_NEMO1}")
    tensors: TorchDist | RankFolders
    weights = folder.inside("model_weights")
    if folder.has("model_weights"):
        tensors = _torch_dist(weights)
    else:
        tied = bool(config.values["share_embeddings_and_output_weights"])
        is_gated = bool(config.values["gated_linear_unit"])
        tensors = RankFolders(folder, _RANK_FILE, drops_head=tied, is_gated=is_gated)
    return tensors, config, nemo1_tokenizer(folder, said.get("tokenizer"))


def _yaml(folder: Folder, name: str) -> dict[str, Any]:
    try:
        found = yaml.safe_load(folder.read(name))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{folder.path}: {name} cannot be read as plain YAML ({reason})."
        ) from error
    return _mapping(folder, name, "it", found)


def _mapping(folder: Folder, name: str, key: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{folder.path}: {name}: {key} is no mapping.")
    return value

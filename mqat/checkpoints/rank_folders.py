"""Weights that each tensor- and pipeline-parallel rank saved as a state dict of its own, put together.

| folder                     | rank                       |
|----------------------------|----------------------------|
| `mp_rank_01`               | tensor 1, the only stage   |
| `mp_rank_01_002`           | tensor 1, stage 2          |
| `tp_rank_01_pp_rank_002`   | tensor 1, stage 2          |

Layers are numbered in their stage there, and in the model here. Rows of gate and up lie there in turns,
rank by rank; here all of gate comes first, as in `torch_dist`.

Source: NeMo 2.0 `collections/nlp/parts/nlp_overrides.py` (NLPSaveRestoreConnector.save_to).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from mqat.checkpoints.folder import Folder
from mqat.checkpoints.records import MappedFile
from mqat.checkpoints.torch_dist import ChunkedTensors
from mqat.errors import UserError
from mqat.models.structure import (
    DENSE_LINEARS,
    OUTPUT_LAYER,
    PLAIN_LINEARS,
    TABLES,
    Linear,
    by_name,
    in_layer,
    is_in_layer,
    split_name,
)

_RANK = re.compile(r"(?:mp_rank_(\d+)(?:_(\d+))?|tp_rank_(\d+)_pp_rank_(\d+))/")


@dataclass(frozen=True)
class _Chunk:
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    tensor: Tensor


class RankFolders(ChunkedTensors):
    """The tensors of such a folder, by their names in the whole model.

    Args:
        folder: With the folders of the table, or with `file` alone.
        file: Name of each rank's state dict.
        drops_head: The head is the embedding, of which the last stage saved a copy.
        is_gated: MLPs have a gate, whose rows are in turns with the others'.

    Raises:
        UserError: A rank is missing, or a file cannot be read.
    """

    def __init__(
        self, folder: Folder, file: str, *, drops_head: bool, is_gated: bool = True
    ) -> None:
        ranks = _ranks(folder, file)
        tp, pp = (1 + max(position[axis] for position in ranks) for axis in (0, 1))
        if len(ranks) != tp * pp:
            raise UserError(
                f"{folder.path}: has weights of {len(ranks)} ranks, of tensor-parallel size {tp} and "
                f"pipeline-parallel size {pp}; copy the missing ones."
            )
        linears = by_name(DENSE_LINEARS if is_gated else PLAIN_LINEARS)
        tensors: dict[str, Any] = {}
        first_layer = 0
        for stage in range(pp):
            shards = [_state(folder, ranks[rank, stage]) for rank in range(tp)]
            count = 0
            for key in shards[0]:
                name, layer = _global_name(key, first_layer)
                count = max(count, layer + 1 - first_layer)
                if drops_head and name.endswith(OUTPUT_LAYER.key):
                    continue
                if any(key not in shard for shard in shards):
                    raise UserError(
                        f"{folder.path}: {key!r} is not in every rank of stage {stage}."
                    )
                tensors.setdefault(name, _joined(key, [shard[key] for shard in shards], linears))
            first_layer += count
        super().__init__(folder.path, tensors)

    def _chunk(self, key: str, chunk: Any) -> Tensor:
        tensor: Tensor = chunk.tensor
        return tensor


def _ranks(folder: Folder, file: str) -> dict[tuple[int, int], str]:
    """(tensor rank, stage) -> name of its file."""
    found = {}
    for name in folder.names():
        match = _RANK.match(name)
        if name == file:
            found[0, 0] = name
        elif match and name == match[0] + file:
            tensor, stage = match[1] or match[3], match[2] or match[4] or "0"
            found[int(tensor), int(stage)] = name
    if not found:
        raise UserError(f"{folder.path}: holds no {file} of any rank.")
    return found


def _state(folder: Folder, name: str) -> Mapping[str, Tensor]:
    """A rank's state dict, mapped."""
    place = folder.place(name)
    try:
        state = MappedFile(place.file).load(place.start, place.length)
        return {str(key): t for key, t in state.items() if isinstance(t, Tensor)}
    except Exception as error:  # damaged pickles raise nearly anything
        raise UserError(f"{folder.path}: {name} cannot be read ({error}).") from error


def _bare(key: str) -> str:
    """A key without the prefix of whoever saved it."""
    return re.sub(r"^(?:(?:model|module)\.)*", "", key)


def _global_name(key: str, first_layer: int) -> tuple[str, int]:
    """Its name in the model, and its layer; -1: of none."""
    bare = _bare(key)
    if not is_in_layer(bare) or not bare.split(".")[2].isdigit():
        return key, -1
    layer, rest = split_name(bare)
    return key.removesuffix(bare) + in_layer(first_layer + layer, rest), first_layer + layer


def _joined(key: str, parts: Sequence[Tensor], linears: Mapping[str, Linear]) -> SimpleNamespace:
    """The whole of what tensor-parallel ranks hold parts of, as an index of chunks."""
    bare = _bare(key)
    module, _, kind = bare.rpartition(".")
    linear = None
    if is_in_layer(module) and kind in ("weight", "bias"):
        linear = linears.get(split_name(module)[1])
    is_table = bare in [table.key for table in TABLES]
    size = list(parts[0].shape)
    if is_table or (linear is not None and linear.parallel == "column"):
        chunks = _row_chunks(linear, parts)
        size[0] *= len(parts)
    elif linear is not None and kind == "weight":
        width = size[1]
        chunks = [_Chunk((0, rank * width), tuple(p.shape), p) for rank, p in enumerate(parts)]
        size[1] *= len(parts)
    else:  # every rank holds all of it
        chunks = [_Chunk((0,) * parts[0].dim(), tuple(size), parts[0])]
    properties = SimpleNamespace(dtype=parts[0].dtype)
    return SimpleNamespace(size=torch.Size(size), properties=properties, chunks=chunks)


def _row_chunks(linear: Linear | None, parts: Sequence[Tensor]) -> list[_Chunk]:
    """Each rank's rows, part by part where the fused parts of a linear lie one after the other."""
    count = 1 if linear is None else linear.separate_parts
    chunks = []
    for rank, tensor in enumerate(parts):
        rows, rest = tensor.shape[0] // count, (0,) * (tensor.dim() - 1)
        for number, piece in enumerate(tensor.chunk(count)):
            start = (number * len(parts) + rank) * rows
            chunks.append(_Chunk((start, *rest), tuple(piece.shape), piece))
    return chunks


def has_rank_folders(folder: Folder) -> bool:
    """Whether a folder has any of the table's."""
    return any(_RANK.match(name) for name in folder.names())

"""The one check that every reader of foreign weights goes through: what is stored is the whole model."""

import re
from collections.abc import Mapping

import torch

from mqat.errors import UserError
from mqat.models.decoder import DecoderConfig

_CHECKED = 1 << 20  # elements whose being numbers is seen at once, so that little memory is used
Shapes = Mapping[str, tuple[int, ...]]


def check_layer_count(
    where: object, stored: Shapes, model: DecoderConfig, said_by: str, *, layer: str
) -> None:
    """Refuses another number of layers, before shapes are listed for as many as a description says.

    Args:
        where: File or directory, for messages.
        stored: Name -> shape, in the order of dimensions of torch.
        model: The description.
        said_by: What describes the model, for messages.
        layer: Prefix of a layer's tensors, with its number as `{i}`.

    Raises:
        UserError: Names both numbers.
    """
    pattern = re.compile(re.escape(layer).replace(r"\{i\}", r"(\d+)"))
    found = {int(match[1]) for match in map(pattern.match, stored) if match}
    if len(found) != model.num_layers:
        raise UserError(
            f"{where}: has tensors of {len(found)} layers, {said_by} says {model.num_layers}; "
            "they belong to different models."
        )


def check_tensors(
    where: object, stored: Shapes, model: DecoderConfig, said_by: str, wanted: Shapes
) -> None:
    """Compares every tensor's full shape with `wanted`, what the description of the model implies.

    Raises:
        UserError: Names a tensor that is missing, has no place, or has another shape.
    """
    for name, shape in wanted.items():
        if name not in stored:
            raise UserError(
                f"{where}: tensor {name!r} is missing; the {model.family} model of {said_by} has it, "
                f"with shape {shape}. Download the weights again, or use their own description."
            )
        if stored[name] != shape:
            raise UserError(
                f"{where}: tensor {name!r} has shape {stored[name]}, but {said_by} implies {shape}; "
                "they belong to different models."
            )
    extra = sorted(set(stored) - set(wanted))
    if extra:
        raise UserError(
            f"{where}: {extra[0]!r} and {len(extra) - 1} more tensors have no place in the "
            f"{model.family} model of {said_by}; import an unquantized model with its own description."
        )


def finite(where: object, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """`tensor`, if all its elements are numbers.

    Raises:
        UserError: Names the file and the tensor.
    """
    rows = max(_CHECKED // max(tensor[:1].numel(), 1), 1)
    if not all(bool(part.isfinite().all()) for part in tensor.split(rows)):
        kind = "NaN" if tensor.isnan().any() else "infinite"
        raise UserError(
            f"{where}: tensor {name!r} has elements that are {kind}; its training failed."
        )
    return tensor

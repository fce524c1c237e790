"""Adapters that a checkpoint holds, compared with those of a model."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mqat.errors import UserError
from mqat.models.adapters import Adapters
from mqat.parallel.add_adapters import adapters_of
from mqat.parallel.quantized_module import quantized_modules


def checkpoint_adapters(description: dict[str, Any]) -> Adapters | None:
    """Adapters recorded in a checkpoint's description, if it has some."""
    found = description.get("adapters")
    return None if found is None else Adapters.from_dict(found)


def check_adapters(chunks: Sequence[Any], adapters: Adapters | None) -> None:
    """Refuses adapters that are not those which the caller names; each rank looks at its own.

    Raises:
        UserError: Names a linear.
    """
    named = set() if adapters is None else {*adapters.names} & quantized_modules(chunks).keys()
    built = {name: adapter.adapters for name, adapter in adapters_of(chunks).items()}
    others = {name for name, own in built.items() if own != adapters}
    if named ^ built.keys() or others:
        name = min(named ^ built.keys() or others)
        raise UserError(
            f"adapters: {name} has {built.get(name)} in the model, but {adapters} are named; give "
            "save_checkpoint and load_checkpoint the adapters that add_adapters_ was given."
        )


def loads_adapters(path: Path, description: dict[str, Any], adapters: Adapters | None) -> bool:
    """Whether the checkpoint's adapters are to be loaded: it has those that the model has, or none."""
    saved = checkpoint_adapters(description)
    if saved is None:
        return False
    if adapters is None:
        raise UserError(
            f"{path}: holds adapters (rank {saved.rank}, on {len(saved.names)} linears), without which "
            "the model is another one; build the model with them (model.peft)."
        )
    if replace(saved, dropout=adapters.dropout) != adapters:
        raise UserError(
            f"{path}: its adapters are {_text(saved)}, the model's {_text(adapters)}. Use the same "
            "ones (model.peft), or start from a checkpoint without."
        )
    return True


def _text(adapters: Adapters) -> str:
    kind = "merged" if adapters.is_merged else "beside the weights"
    return (
        f"of rank {adapters.rank}, alpha {adapters.alpha:g}, {kind}, on {len(adapters.names)} linears "
        f"from {adapters.names[0]}"
    )

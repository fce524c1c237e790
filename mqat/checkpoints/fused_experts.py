"""Experts of a layer in one tensor, as transformers 5 computes with them, seen one by one.

| fused                                | shape       | seen as                                     |
|--------------------------------------|-------------|---------------------------------------------|
| `mlp.experts.gate_up_proj`           | [E, 2 F, H] | gate [F, H] and up [F, H] of E experts      |
| `mlp.experts.down_proj`              | [E, H, F]   | down [H, F] of E experts                    |
| `mlp.gate.weight`                    | [E, H]      | the router, by its name beside the others   |

`save_pretrained` writes them one by one, `save_original_format=False` and other tools as they are.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from mqat.models.decoder import DecoderConfig
from mqat.models.experts import FUSED_EXPERTS, ROUTER

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies: in one of its own, or some rows of an expert's part of a fused one."""

    name: str
    expert: int | None = None
    first_row: int = 0


def one_by_one(
    shapes: Mapping[str, Shape], model: DecoderConfig
) -> tuple[dict[str, Shape], dict[str, Stored]]:
    """Shape of every tensor as if experts were stored apart, and where each of these lies.

    Args:
        shapes: Of what is stored, by name; without fused tensors the same comes back.
        model: Whose names separate experts have.
    """
    found, places = dict(shapes), {name: Stored(name) for name in shapes}
    mixture, prefix = model.architecture.mixture, model.architecture.hf_layer
    if mixture is None:
        return found, places
    experts, (gate_up, down) = mixture.experts, FUSED_EXPERTS
    for layer in range(model.num_layers):
        start = prefix.format(i=layer)
        fused = {start + gate_up: experts.hf_parts[:2], start + down: experts.hf_parts[2:]}
        for name, parts in fused.items():
            if len(shapes.get(name, ())) != 3:
                continue
            count, rows, columns = found.pop(name)
            del places[name]
            for number in range(count):
                for place, part in enumerate(parts):
                    own = f"{start}{experts.hf.format(e=number)}{part}.weight"
                    found[own] = (rows // len(parts), columns)
                    places[own] = Stored(name, number, place * (rows // len(parts)))
        router, wanted = f"{start}{ROUTER.hf}.weight", f"{start}{experts.router.hf}.weight"
        if router in found and wanted not in found:
            found[wanted] = found.pop(router)
            places[wanted] = places.pop(router)
    return found, places

"""What a linear of a checkpoint must look like when served: codes on its frozen grid."""

from dataclasses import dataclass, replace
from functools import cached_property

from torch import Tensor

from mqat.checkpoints.reader import CheckpointReader
from mqat.quant.scheme import LinearScheme
from mqat.verify.facts import Facts
from mqat.verify.reference_quant import quantize_weight


def layer_key(
    checkpoint: CheckpointReader, facts: Facts, layer: int, name: str
) -> tuple[str, tuple[slice, ...]]:
    """Key and leading indices of a layer's tensor: layers are stacked, unless some have no experts."""
    if checkpoint.model.dense_layers:
        return facts.key(f"{layer}.{name}"), ()
    return facts.key(name), (slice(layer, layer + 1),)


def layer_tensor(
    checkpoint: CheckpointReader, facts: Facts, layer: int, name: str, *region: slice
) -> Tensor:
    """A region of a layer's tensor."""
    key, lead = layer_key(checkpoint, facts, layer, name)
    found = checkpoint.read(key, (*lead, *region))
    return found[0] if lead else found


@dataclass(frozen=True)
class CheckpointLinear:
    """One linear of the checkpoint."""

    checkpoint: CheckpointReader
    facts: Facts
    layer: int  # global number
    linear: str  # name in a layer, of `facts.fused`

    @property
    def name(self) -> str:
        """Global name."""
        return self.facts.key(f"{self.layer}.{self.linear}")

    @property
    def scheme(self) -> LinearScheme | None:
        """None if it is not quantized."""
        return self.checkpoint.layers.get(self.name)

    def _of_layer(self, kind: str) -> Tensor:
        number = self.facts.fused[self.linear].get("expert")
        told = (self.checkpoint, self.facts, self.layer, self._stacked(kind))
        if number is None:
            return layer_tensor(*told)
        return layer_tensor(*told, slice(number, number + 1))[0]

    def _stacked(self, kind: str) -> str:
        """In a layer of checkpoints, which stack its experts."""
        return f"{self.facts.fused[self.linear].get('stacked', self.linear)}.{kind}"

    @cached_property
    def weight(self) -> Tensor:
        """Float32 [O, I]."""
        return self._of_layer("weight").float()

    def bias(self) -> Tensor | None:
        """[O], as stored; None: there is none."""
        key, _ = layer_key(self.checkpoint, self.facts, self.layer, self._stacked("bias"))
        return self._of_layer("bias") if self.checkpoint.has(key) else None

    def frozen(self, tensor: str) -> Tensor:
        """A frozen tensor: `weight_scale`, `weight_zero_point`, `input_scale`, ..."""
        return self.checkpoint.frozen(self.name, *tensor.split("_", 1))

    def of_all_experts(self) -> list["CheckpointLinear"]:
        """The same linear in every expert of the layer."""
        own = self.facts.fused[self.linear]["stacked"]
        names = [name for name, entry in self.facts.fused.items() if entry.get("stacked") == own]
        return [replace(self, linear=name) for name in names]

    @cached_property
    def codes(self) -> Tensor:
        """Of the weight on its frozen grid, as `reference_quant.quantize_weight` gives them."""
        assert self.scheme is not None and self.scheme.weight is not None, self.name
        scheme = self.scheme.weight
        zero = self.frozen("weight_zero_point") if scheme.is_asymmetric else None
        scale, granularity = self.frozen("weight_scale"), str(scheme.granularity)
        return quantize_weight(self.weight, scale, granularity, scheme.format.name, zero)

    def by_part(self, tensor: Tensor) -> dict[str, Tensor]:
        """Rows of a tensor of the fused linear, by role."""
        fused, model = self.facts.fused[self.linear], self.checkpoint.model
        heads, groups = model.num_attention_heads, model.num_query_groups
        sizes = {"query": heads * model.head_dim, "key_value": groups * model.head_dim}
        sizes |= {"intermediate": model.intermediate_size, "hidden": model.hidden_size}
        sizes |= {
            "expert": model.expert_intermediate_size, "shared": model.shared_intermediate_size
        }  # fmt: skip
        roles = fused["parts"]
        rows = [sizes[self.facts.parts[role].rows] for role in roles]
        if "is_by_query_group" not in fused:
            return dict(zip(roles, tensor.split(rows), strict=True))
        blocks = tensor.unflatten(0, (groups, -1)).split([count // groups for count in rows], dim=1)
        return {r: block.flatten(0, 1) for r, block in zip(roles, blocks, strict=True)}

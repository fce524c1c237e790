"""What calibration, checkpoints and schedules know of a module: its name and its quantizers."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from mqat.errors import UserError
from mqat.quant.quantizer import Quantizer
from mqat.transfer import to_device


@dataclass(frozen=True)
class ExpertGroups:
    """Who else has to do with an expert.

    Attributes:
        tp: Ranks with other parts of it.
        dp: Ranks with copies of it.
        ep: Ranks with other experts of the layer.
    """

    tp: Any
    dp: Any
    ep: Any


class QuantizedModule(nn.Module):
    """A module some of whose tensors pass through quantizers.

    The quantizer called `weight`, if there is one, belongs to the parameter `weight`; all others see
    activations, and every rank of the stage ends up with the same scale for those.

    Attributes:
        quantized_name: Global name, such as `decoder.layers.3.mlp.linear_fc1`.
        tp_group: Ranks that hold other parts of it.
        parts: Number of weights fused along the output rows that are cut separately (gate, up).
        is_calibrating: Compute unquantized, whatever is frozen.
        expert_groups: Of a module of an expert; None: all ranks of the stage share it.
        token_mask: bool [b, s] on the host, False for padding and filler of the microbatch that comes
            next (`set_token_mask`); None: every token is real.
    """

    quantized_name: str
    tp_group: Any
    weight: Tensor
    parts: int = 1
    is_calibrating: bool = False
    expert_groups: ExpertGroups | None = None
    token_mask: Tensor | None = None

    @property
    def quantizers(self) -> dict[str, Quantizer]:
        """Kind (`weight`, `input`, `kv`, ...) -> quantizer."""
        raise NotImplementedError

    def begin_calibration(self) -> None:
        """Computes unquantized from now on."""
        self.is_calibrating = True

    def end_calibration(self) -> None:
        """Back to the normal mode."""
        self.is_calibrating = False

    def real_tokens(self, x: Tensor) -> Tensor:
        """What `token_mask` keeps of activations: [n, ...], without gradient; n may be 0.

        Of [s, b, ...], or under sequence parallelism of this rank's part [s/tp, b, ...].
        """
        if self.token_mask is None:
            return x.detach().flatten(0, 1)
        mask = self.token_mask.t()
        if len(x) != len(mask):  # sequence parallelism: each rank has consecutive tokens
            mask = mask.chunk(self.tp_group.size())[self.tp_group.rank()]
        assert mask.shape == x.shape[:2], f"{self.quantized_name}: {x.shape} with {mask.shape}"
        # Counted on the host, which would have to wait for the device's count.
        kept = to_device(mask.reshape(-1).nonzero().squeeze(1), x.device)
        return x.detach().flatten(0, 1).index_select(0, kept)

    def observe(self, kind: str, x: Tensor) -> None:
        """Shows the real tokens of `x` to the quantizer `kind`, if it is there and is observing."""
        quantizer = self.quantizers.get(kind)
        if quantizer is not None and quantizer.observer is not None:
            quantizer.observer.observe_(self.real_tokens(x))


def quantized_modules(model: Any) -> dict[str, QuantizedModule]:
    """Modules of this rank by global name, for a model or a list of pipeline chunks.

    Raises:
        UserError: Two have one name, as with one layer spec for several layers.
    """
    chunks = model if isinstance(model, (list, tuple)) else [model]
    found: dict[str, QuantizedModule] = {}
    for module in (m for chunk in chunks for m in chunk.modules()):
        if not isinstance(module, QuantizedModule):
            continue
        if module.quantized_name in found:
            raise UserError(
                f"two modules are called {module.quantized_name}: quantize_layer_spec makes the spec of "
                "one layer, whose number is `layer`; give each layer its own in layer_specs."
            )
        found[module.quantized_name] = module
    return found


def sharing_statistics(
    modules: Mapping[str, QuantizedModule], group: Any
) -> Iterator[tuple[list[str], tuple[Any, ...]]]:
    """Names of modules, and the groups of ranks over which their statistics merge, one after another.

    `group` is TP x DP x CP of this pipeline stage; experts know theirs.
    """
    yield [n for n, m in modules.items() if m.expert_groups is None], (group,)
    experts = {n: m.expert_groups for n, m in modules.items() if m.expert_groups is not None}
    for groups in list(experts.values())[:1]:  # the same for all
        yield list(experts), (groups.tp, groups.dp)


def set_token_mask(model: Any, mask: Tensor | None) -> None:
    """Says which tokens of the next microbatch are real, bool [b, s] on the host; None: all."""
    for module in quantized_modules(model).values():
        module.token_mask = mask


def all_quantizers(model: Any) -> list[Quantizer]:
    """Every quantizer of this rank."""
    modules = quantized_modules(model).values()
    return [quantizer for module in modules for quantizer in module.quantizers.values()]


def unwrapped(model: Any) -> list[Any]:
    """GPTModels of this rank, out of a list of chunks, DDP and Float16Module."""
    chunks = []
    for chunk in model if isinstance(model, list | tuple | nn.ModuleList) else [model]:
        while not hasattr(chunk, "decoder") and hasattr(chunk, "module"):
            chunk = chunk.module
        if not hasattr(chunk, "decoder"):
            raise UserError(f"model: {type(chunk).__name__} is not a Megatron GPTModel.")
        chunks.append(chunk)
    return chunks

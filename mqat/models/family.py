"""What tells one family of Llama-like decoders from another, as data.

All of them normalize with RMSNorm, rotate half of each head's channels against the other half, and have
a gated MLP. A further family is a further file in `families/` like `qwen2.py`, its name in
`decoder.FAMILIES`, and, as a second opinion, a file in `verify/facts/`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mqat.errors import UserError
from mqat.models.structure import DENSE_LINEARS, DENSE_NORMS, Experts, Linear, Norm


@dataclass(frozen=True)
class SlidingWindow:
    """How a Hugging Face `config.json` says that tokens attend to near ones only.

    Attributes:
        default: Value of `sliding_window` where the key is absent.
        switch: Key that turns it on, false where absent; None: it is always on.
        first_layer: Key of the first layer that has it, with its value where absent; None: all have.
    """

    default: int | None
    switch: str | None = None
    first_layer: tuple[str, int] | None = None


@dataclass(frozen=True)
class Mixture:
    """The experts of a family, and how a Hugging Face `config.json` describes them.

    Attributes:
        experts: Their names.
        count: Key of their number.
        size: Key of their intermediate size.
        normalizes: Key that says whether a token's weights for its experts add up to one; None: they
            always do.
        is_everywhere: Keys that could leave layers without experts, with the values that do not.
    """

    experts: Experts
    count: str
    size: str
    normalizes: str | None = None
    is_everywhere: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Family:
    """Names of a family, and which of its linears have biases.

    Attributes:
        name: `model_type` of Hugging Face.
        hf_architecture: Class there.
        gguf_architecture: `general.architecture` of llama.cpp; None: not read from its files.
        is_interleaved_in_gguf: llama.cpp stores query and key rows with the halves of a head
            interleaved.
        trtllm_architecture: Of TensorRT-LLM's `config.json`.
        decoder_types: Values of `decoder_type` that mean it, as in NeMo and ModelOpt.
        linears: Of every layer, in the order of the forward pass; without those of experts.
        norms: Of every layer.
        biased: Names of linears that always have a bias.
        bias_switches: Key of the Hugging Face `config.json` -> names of linears that it gives biases.
        head_dim_is_stated: transformers has a default of its own for `head_dim`.
        window: How a sliding window is declared; None: there is none.
        mixture: In the place of a dense MLP; None: there is none.
        hf_extra: Further keys of the Hugging Face `config.json`.
        trtllm_extra: Further keys of TensorRT-LLM's.
    """

    name: str
    hf_architecture: str
    gguf_architecture: str | None
    is_interleaved_in_gguf: bool
    trtllm_architecture: str
    decoder_types: tuple[str, ...]
    linears: tuple[Linear, ...] = DENSE_LINEARS
    norms: tuple[Norm, ...] = DENSE_NORMS
    biased: tuple[str, ...] = ()
    bias_switches: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    head_dim_is_stated: bool = False
    window: SlidingWindow | None = None
    mixture: Mixture | None = None
    hf_extra: Mapping[str, Any] = field(default_factory=dict)
    trtllm_extra: Mapping[str, Any] = field(default_factory=dict)

    def biases_of(self, hf: Mapping[str, Any]) -> tuple[str, ...]:
        """Linears with a bias, as a Hugging Face `config.json` says."""
        switched = [
            linear
            for key, linears in self.bias_switches.items()
            if hf.get(key, False)
            for linear in linears
        ]
        return (*self.biased, *switched)

    def may_have(self, biases: tuple[str, ...]) -> bool:
        """Whether the family can have biases on these linears, and only on them."""
        return set(self.biases_of(self._switches(biases))) == set(biases)

    def _switches(self, biases: tuple[str, ...]) -> dict[str, bool]:
        return {
            key: all(linear in biases for linear in linears)
            for key, linears in self.bias_switches.items()
        }

    def switches_of(self, biases: tuple[str, ...]) -> dict[str, bool]:
        """The inverse: value of each switch.

        Raises:
            ValueError: The family cannot have biases there, and only there.
        """
        if not self.may_have(biases):
            possible = [self.biased, *self.bias_switches.values()]
            raise UserError(
                f"biases on {list(biases)}: a {self.name} model has them on "
                f"{' and '.join(str(list(p)) for p in possible if p) or 'no linear'}, nowhere else."
            )
        return self._switches(biases)

"""Which linear gets which scheme: a default algorithm, and ordered name patterns that override it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from mqat.models.llama import LINEARS, LlamaConfig
from mqat.quant.scheme import LinearScheme, named_scheme


@dataclass(frozen=True)
class Rule:
    """Linears whose global name matches `pattern` (shell style) use `algorithm`."""

    pattern: str
    algorithm: str


@dataclass(frozen=True)
class Policy:
    """Default algorithm for every linear of the decoder; the first matching rule overrides it.

    The embedding and the output layer are never quantized.
    """

    algorithm: str
    group_size: int = 128
    rules: Sequence[Rule] = field(default=())

    def resolve(self, model: LlamaConfig) -> dict[str, LinearScheme]:
        """Global linear name -> scheme, in model order; unquantized linears are absent.

        Raises:
            ValueError: Unknown algorithm, or a rule that no linear matches.
        """
        names = [f"decoder.layers.{i}.{n}" for i in range(model.num_layers) for n in LINEARS]
        for rule in self.rules:
            if not any(fnmatchcase(name, rule.pattern) for name in names):
                raise ValueError(
                    f"quantization.rules: pattern {rule.pattern!r} matches no linear. Names look "
                    f"like {names[0]!r}; the embedding and output layer are never quantized."
                )
        resolved = {}
        for name in names:
            algorithm = next(
                (rule.algorithm for rule in self.rules if fnmatchcase(name, rule.pattern)),
                self.algorithm,
            )
            scheme = named_scheme(algorithm, group_size=self.group_size)
            if scheme is not None:
                resolved[name] = scheme
        return resolved

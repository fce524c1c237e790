"""Which form serves a linear: found by its operands in an exporter's list of forms, never by a name."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from mqat.errors import UserError
from mqat.export.operands import OperandPattern, group_size, operands_text
from mqat.export.tensor_builders import TensorBuilders
from mqat.quant.scheme import LinearScheme, TensorScheme


@dataclass(frozen=True)
class Form:
    """How a server holds linears of some operands.

    Attributes:
        name: The server's.
        weight: Weights that it takes.
        input: Inputs that it takes; None: unquantized ones.
        tensors: Of each linear.
    """

    name: str
    weight: OperandPattern
    input: OperandPattern | None
    tensors: TensorBuilders

    def unmet(self, scheme: LinearScheme) -> list[str]:
        """Requirements of the form that a scheme does not meet, in words; empty: it serves it."""
        found = self.weight.unmet("weight", scheme.weight)
        if self.input is not None:
            found += self.input.unmet("input", scheme.input)
        elif scheme.input is not None:
            found.append("an unquantized input")
        return found + ["an unquantized output"] * (scheme.output is not None)


F_co = TypeVar("F_co", bound=Form, covariant=True)


@dataclass(frozen=True)
class Forms(Generic[F_co]):
    """All forms of a server.

    Attributes:
        server: For messages.
        forms: A further form is a further row.
        advice: (weight and input, what to use instead) for those without a form; the first that fits.
    """

    server: str
    forms: tuple[F_co, ...]
    advice: tuple[tuple[Callable[[TensorScheme, TensorScheme | None], bool], str], ...] = ()

    def of(self, scheme: LinearScheme) -> F_co:
        """The form that serves the operands of a scheme that passed `check`."""
        return next(form for form in self.forms if not form.unmet(scheme))

    def check(self, layers: Mapping[str, LinearScheme]) -> None:
        """Refuses linears whose operands have no form.

        Raises:
            UserError: Names the first, its operands, what the nearest form asks, and what would work.
        """
        firsts: dict[LinearScheme, str] = {}
        for name, scheme in layers.items():  # thousands of experts, few schemes
            firsts.setdefault(scheme, name)
        for scheme, name in firsts.items():
            candidates = ((form.unmet(scheme), form.name) for form in self.forms)
            unmet, nearest = min(candidates, key=lambda candidate: len(candidate[0]))
            if not unmet:
                continue
            weight = scheme.weight
            fitting = (text for fits, text in self.advice if weight and fits(weight, scheme.input))
            raise UserError(
                f"{name}: {operands_text(scheme)} cannot be exported to {self.server}. Its nearest "
                f"form, {nearest}, needs {' and '.join(unmet)}. {next(fitting, '')}".rstrip()
            )

    def check_groups(self, name: str, scheme: LinearScheme, width: int, ranks: int = 1) -> None:
        """Refuses groups that a row of `width` elements, cut over ranks, does not hold whole.

        Raises:
            UserError: Names the linear, its sizes, and the group sizes that fit.
        """
        size = group_size(scheme)
        if size is not None and width % (size * ranks):
            usual = (32, 64, 128, 256)
            fitting = [candidate for candidate in usual if width % (candidate * ranks) == 0]
            raise UserError(
                f"{name}: group_size={size} does not divide in_features={width} / "
                f"export.inference_tensor_parallel={ranks}, and {self.server} has no shorter last "
                f"group. Group sizes that fit: {fitting or 'none of the usual ones'}."
            )

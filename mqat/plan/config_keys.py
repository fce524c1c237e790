"""What every key of the configuration means, takes and defaults to, read off the sections themselves."""

import ast
import difflib
import inspect
import io
import textwrap
import tokenize
import types
from collections.abc import Iterator
from dataclasses import MISSING, Field, dataclass, fields
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml

from mqat.config import CHOICES, MINIMUM, RESUME_CHANGES, RunConfig, section
from mqat.errors import UserError
from mqat.export.exporter import DTYPES
from mqat.export.exporters import EXPORTERS
from mqat.quant.algorithm import ALGORITHMS, ROUNDINGS, SQ_GRIDS, WEIGHT_CALIBRATORS
from mqat.quant.formats import FORMATS
from mqat.quant.scales import EXPONENTS
from mqat.specs.policy import SCALES

_OPERAND = {"format": tuple(FORMATS), "scale": tuple(SCALES), "exponent": EXPONENTS}
# Those that are refused elsewhere than in `mqat.config`.
_CHOICES: dict[str, tuple[Any, ...]] = {
    **CHOICES,
    "quantization.algorithm": ALGORITHMS,
    "quantization.rules[].algorithm": ALGORITHMS,
    **{
        f"quantization.rules[].{operand}.{key}": values
        for operand in ("weight", "input", "output")
        for key, values in _OPERAND.items()
    },
    "quantization.smoothquant": ("auto", True, False),
    "quantization.sq_alpha": ("auto", None, "a number from 0 to 1"),
    "quantization.sq_grid": ("auto", *SQ_GRIDS),
    "quantization.weight_calibrator": ("auto", *WEIGHT_CALIBRATORS),
    "quantization.rounding": ("auto", *ROUNDINGS),
    "quantization.distill.divergence": ("forward_kl", "reverse_kl"),
    "export.format": (None, *dict.fromkeys(e.format for e in EXPORTERS)),
    "export.style": (None, *(e.style for e in EXPORTERS if e.style is not None)),
    "export.dtype": DTYPES,
    "exp_manager.resume_changes": RESUME_CHANGES,
}
_WORDS = {int: "integer", float: "number", str: "text", bool: "true or false", Any: "value"}


@dataclass(frozen=True)
class Key:
    """A key, or a section of keys.

    Attributes:
        name: From the top, with dots; `rules[]` is any of the rules.
        meaning: The comment of its field.
        takes: Kind of value, with what it is limited to.
        default: As YAML; empty where there is none.
        choices: As YAML; empty where any value of the kind will do.
        about: What the section is, where it is one.
    """

    name: str
    meaning: str
    takes: str
    default: str
    choices: tuple[str, ...] = ()
    about: str = ""

    @property
    def section(self) -> str:
        """The one that it is in; empty at the top."""
        return self.name.rpartition(".")[0].removesuffix("[]")


def as_yaml(value: Any) -> str:
    """A value as it is written in a configuration, on one line."""
    if isinstance(value, float):
        return f"{value:g}"
    text = yaml.safe_dump(value, default_flow_style=True, width=1000)
    return str(text).removesuffix("\n").removesuffix("\n...")


def meanings(schema: type) -> dict[str, str]:
    """Field -> its comment in the source: behind it, or on the lines right above it."""
    source = textwrap.dedent(inspect.getsource(schema))
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {t.start[0]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT}
    alone = [line.lstrip().startswith("#") for line in source.splitlines()]
    found = {}
    for node in ast.parse(source).body[0].body:  # type: ignore[attr-defined]
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)):
            continue
        first = node.lineno
        while alone[first - 2]:  # lines are counted from 1
            first -= 1
        lines = range(first, (node.end_lineno or node.lineno) + 1)
        found[node.target.id] = " ".join(comments[n] for n in lines if n in comments)
    return found


def _takes(hint: Any) -> str:
    """The kind of value of an annotation, in words."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (types.UnionType, Union):
        words = [_takes(kind) for kind in inner if kind is not type(None)]
        return " or ".join([*words, "null"])
    if origin is list:
        return f"list of {_takes(inner[0])}"
    if origin is dict:
        return "mapping"
    return _WORDS.get(hint, "section")


def _default(field: Field[Any]) -> str:
    if field.default_factory is not MISSING:
        value = field.default_factory()
        return "" if not isinstance(value, list | dict) else as_yaml(value)
    return "" if field.default is MISSING else as_yaml(field.default)


def keys(schema: type = RunConfig, path: str = "") -> Iterator[Key]:
    """Every key and section below a section, in the order of the source."""
    hints, comments = get_type_hints(schema), meanings(schema)
    for field in fields(schema):
        name, hint = f"{path}{field.name}", hints[field.name]
        takes = _takes(hint)
        if MINIMUM.get(name) is not None:
            takes += f", at least {MINIMUM[name]:g}"
        nested = section(schema, field.name)
        about = "" if nested is None else (inspect.getdoc(nested) or "").splitlines()[0]
        choices = tuple(map(as_yaml, _CHOICES.get(name, ())))
        yield Key(name, comments[field.name], takes, _default(field), choices, about)
        if nested is not None:
            yield from keys(nested, f"{name}[]." if get_origin(hint) is list else f"{name}.")


def find_keys(name: str) -> list[Key]:
    """A key, or a section with all that is below it.

    Raises:
        UserError: There is none; says which ones come near.
    """
    known = list(keys())
    wanted = name.replace("[]", "")
    found = [k for k in known if f"{k.name.replace('[]', '')}.".startswith(f"{wanted}.")]
    if found:
        return found
    names = [key.name for key in known]
    near = [key for key in names if key.rpartition(".")[2] == wanted]  # its last part alone
    near = near or difflib.get_close_matches(wanted, names, n=3)
    last = {key.rpartition(".")[2]: key for key in names}
    close = difflib.get_close_matches(wanted.rpartition(".")[2], last, n=3)
    near = near or [last[part] for part in close]
    hint = f"did you mean {', '.join(near)}?" if near else "mqat config lists them all."
    raise UserError(f"unknown key {name!r}; {hint}")

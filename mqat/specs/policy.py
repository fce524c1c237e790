"""Which linear gets which scheme: a default algorithm, and ordered name patterns that override it.

The key/value cache has one scheme for all layers: every server has one cache dtype.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from mqat.errors import UserError
from mqat.models.decoder import DecoderConfig
from mqat.models.schemes import Scheme
from mqat.models.structure import CORE_ATTENTION, EMBEDDING, TABLES, in_layer
from mqat.quant.formats import FORMATS
from mqat.quant.granularity import PerChannel, PerGroup, granularity_from_str
from mqat.quant.kv_cache import kv_cache_scheme
from mqat.quant.scales import SCALE_DTYPES
from mqat.quant.scheme import (
    LinearScheme,
    TensorScheme,
    named_scheme,
    nearest_hint,
)

# Shorter spellings of scale grids in configurations.
_SCALES = SCALE_DTYPES | {
    "e8m0": SCALE_DTYPES["float8_e8m0fnu"],
    "e4m3": SCALE_DTYPES["float8_e4m3fn"],
}
_KEYS = ("format", "granularity", "scale", "dynamic", "asymmetric")


@dataclass(frozen=True)
class Rule:
    """How linears whose global name matches `pattern` (shell style) are quantized.

    Attributes:
        pattern: Such as `decoder.layers.0.*` or `*.mlp.linear_fc2`.
        algorithm: Of `named_scheme`; or None, with
        operands: `weight`, `input`, `output` -> settings (see `tensor_scheme`).
    """

    pattern: str
    algorithm: str | None = None
    operands: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def tensor_scheme(settings: Mapping[str, Any], path: str) -> TensorScheme:
    """One operand's scheme from a configuration, such as `{format: int4, granularity: group:64}`.

    Args:
        settings: `format` (a name of `formats.FORMATS`), `granularity` (tensor, channel, token,
            group:<size>, block:<size>), and optionally `scale` (float32, bfloat16, e8m0, e4m3),
            `dynamic`, `asymmetric`.
        path: Key in the configuration, for messages.

    Raises:
        ValueError: Missing or unknown key or value, or a combination without a meaning; names the
            key, the value and the nearest valid one.
    """
    for key in settings:
        if key not in _KEYS:
            raise UserError(f"config: unknown key {f'{path}.{key}'!r}; {nearest_hint(key, _KEYS)}")
    for key in ("format", "granularity"):
        if settings.get(key) is None:
            raise UserError(f"config: {path}.{key} is missing.")
    name, scale = settings["format"], settings.get("scale") or "float32"
    if name not in FORMATS:
        raise UserError(f"config: {path}.format={name!r} is unknown; {nearest_hint(name, FORMATS)}")
    if scale not in _SCALES:
        raise UserError(
            f"config: {path}.scale={scale!r} is unknown; {nearest_hint(scale, _SCALES)}"
        )
    flags = {key: settings.get(key) or False for key in ("dynamic", "asymmetric")}
    for key, value in flags.items():
        if not isinstance(value, bool):
            raise UserError(f"config: {path}.{key}={value!r} must be true or false.")
    try:
        return TensorScheme(
            FORMATS[name],
            granularity_from_str(str(settings["granularity"])),
            _SCALES[scale],
            is_dynamic=flags["dynamic"],
            is_asymmetric=flags["asymmetric"],
        )
    except ValueError as error:
        raise UserError(f"config: {path}: {error}") from error


def _check_table(name: str, scheme: LinearScheme, model: DecoderConfig) -> None:
    """Refuses what a vocabulary table cannot do.

    Raises:
        ValueError: Names the table, the setting, and what would work.
    """
    if model.tie_word_embeddings:
        raise UserError(
            f"quantization.rules: {name} cannot be quantized: this model's embedding and output layer "
            "are one weight, so one grid would round token vectors and logits alike, and no format "
            "stores such a table. Untie them (tie_word_embeddings: false), or leave the rule out."
        )
    allowed = ("weight",) if name == EMBEDDING.name else ("weight", "input")
    for kind in scheme.operands:
        if kind not in allowed:
            raise UserError(
                f"quantization.rules: {name} has no {kind} to quantize, only {' and '.join(allowed)}; "
                "choose a weight-only algorithm, or give the rule a weight alone."
            )
    weight = scheme.weight
    if weight is None or not isinstance(weight.granularity, PerChannel | PerGroup):
        found = None if weight is None else str(weight.granularity)
        raise UserError(
            f"quantization.rules: {name}.weight has granularity {found!r}; rows of the vocabulary are "
            "padded and cut over ranks, so it must be 'channel' or 'group:<size>'."
        )


@dataclass(frozen=True)
class Policy:
    """Default algorithm for every linear of the decoder; the first matching rule overrides it.

    The embedding and the output layer are quantized only by a rule whose pattern is exactly their name
    (`models.structure.TABLES`): no wildcard reaches them.

    Attributes:
        algorithm: Of linears without a rule.
        group_size: None: each algorithm's own.
        rules: In order.
        kv_cache: As for `kv_cache_scheme`; None: not quantized.
        kv_cache_scales: As for `kv_cache_scheme`.
        disabled: Patterns of operands that stay unquantized after all, in training and when served,
            such as `*.linear_fc2.input`.
    """

    algorithm: str
    group_size: int | None = None
    rules: Sequence[Rule] = field(default=())
    kv_cache: str | None = None
    kv_cache_scales: str = "shared"
    disabled: Sequence[str] = field(default=())

    def resolve(self, model: DecoderConfig) -> dict[str, Scheme]:
        """Global name -> scheme: linears in model order, tables, caches; what is unquantized is absent.

        Raises:
            ValueError: Unknown algorithm, cache or operand settings, a pattern that matches nothing, or
                a vocabulary table that cannot be quantized like that.
        """
        layers = range(model.num_layers)
        names = [in_layer(i, linear.name) for i in layers for linear in model.linears]
        tables = [table.name for table in TABLES]
        default = named_scheme(self.algorithm, group_size=self.group_size)
        schemes = [self._scheme(index, rule) for index, rule in enumerate(self.rules)]
        for rule in self.rules:
            if rule.pattern not in tables and not any(fnmatchcase(n, rule.pattern) for n in names):
                raise UserError(
                    f"quantization.rules: pattern {rule.pattern!r} matches no linear. Names look "
                    f"like {names[0]!r}; vocabulary tables are quantized only by a rule that says "
                    f"exactly {' or '.join(tables)}."
                )
        resolved: dict[str, LinearScheme] = {}
        for name in names:
            matching = (
                scheme
                for rule, scheme in zip(self.rules, schemes, strict=True)
                if fnmatchcase(name, rule.pattern)
            )
            scheme = next(matching, default)
            if scheme is not None:
                resolved[name] = scheme
        for table in tables:
            named = (
                s for rule, s in zip(self.rules, schemes, strict=True) if rule.pattern == table
            )
            scheme = next(named, None)
            if scheme is not None:
                _check_table(table, scheme, model)
                resolved[table] = scheme
        found: dict[str, Scheme] = {**self._without_disabled(resolved, names)}
        if self.kv_cache is not None:
            cache = kv_cache_scheme(self.kv_cache, self.kv_cache_scales)
            found |= {in_layer(i, CORE_ATTENTION.name): cache for i in layers}
        return found

    def _without_disabled(
        self, layers: dict[str, LinearScheme], names: Sequence[str]
    ) -> dict[str, LinearScheme]:
        operands = [f"{name}.{kind}" for name, scheme in layers.items() for kind in scheme.operands]
        for pattern in self.disabled:
            if not any(fnmatchcase(operand, pattern) for operand in operands):
                raise UserError(
                    f"quantization.disabled: pattern {pattern!r} matches nothing that is quantized. "
                    f"Names look like {next(iter(operands), names[0] + '.input')!r}."
                )
        kept: dict[str, LinearScheme] = {}
        for name, scheme in layers.items():
            left = {
                kind: operand
                for kind, operand in scheme.operands.items()
                if not any(fnmatchcase(f"{name}.{kind}", pattern) for pattern in self.disabled)
            }
            if left == scheme.operands:
                kept[name] = scheme
            elif left:
                kept[name] = LinearScheme(
                    "custom", left.get("weight"), left.get("input"), left.get("output")
                )
        return kept

    def _scheme(self, index: int, rule: Rule) -> LinearScheme | None:
        path = f"quantization.rules[{index}]"
        if rule.algorithm is not None and rule.operands:
            raise UserError(
                f"config: {path} has both algorithm={rule.algorithm!r} and "
                f"{', '.join(rule.operands)}; a rule names an algorithm or composes its own."
            )
        if not rule.operands:
            return named_scheme(rule.algorithm or "null", group_size=self.group_size)
        kinds = ("weight", "input", "output")
        for kind in rule.operands:
            if kind not in kinds:
                hint = nearest_hint(kind, kinds)
                raise UserError(f"config: unknown key {f'{path}.{kind}'!r}; {hint}")
        parts = {
            kind: tensor_scheme(settings, f"{path}.{kind}")
            for kind, settings in rule.operands.items()
        }
        try:
            return LinearScheme(
                "custom", parts.get("weight"), parts.get("input"), parts.get("output")
            )
        except ValueError as error:
            raise UserError(f"config: {path}.{error}") from error

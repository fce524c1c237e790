"""Which linear gets which algorithm: a default, and ordered name patterns that override it.

The recipe of a linear is put together from three layers, later ones winning:

1. what its algorithm's name promises (`int8_sq`, `int4_awq`, `w4a8_awq`), or nothing;
2. the configuration's own keys (`quantization.smoothquant`, ...), for linears of the default algorithm
   and for rules whose algorithm promises nothing: a rule with `int4_awq` is AWQ as named;
3. the `recipe` of the rule.

The key/value cache has one scheme for all layers: every server has one cache dtype.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

from mqat.errors import UserError, nearest_hint
from mqat.models.decoder import DecoderConfig
from mqat.models.schemes import Scheme
from mqat.models.structure import CORE_ATTENTION, EMBEDDING, TABLES, in_layer, is_expert
from mqat.quant.algorithm import Algorithm, Recipe, named_algorithm
from mqat.quant.formats import FORMATS
from mqat.quant.granularity import PerChannel, PerGroup, granularity_from_str
from mqat.quant.kv_cache import KvCacheScheme, kv_cache_scheme
from mqat.quant.scales import SCALE_DTYPES
from mqat.quant.scheme import LinearScheme, TensorScheme

# Shorter spellings of scale grids in configurations.
SCALES = SCALE_DTYPES | {
    "e8m0": SCALE_DTYPES["float8_e8m0fnu"],
    "e4m3": SCALE_DTYPES["float8_e4m3fn"],
}
_KEYS = ("format", "granularity", "scale", "dynamic", "asymmetric", "exponent")


@dataclass(frozen=True)
class Rule:
    """How linears whose global name matches `pattern` (shell style) are quantized.

    Attributes:
        pattern: Such as `decoder.layers.0.*` or `*.mlp.linear_fc2`.
        algorithm: Of `named_algorithm`; or None, with
        operands: `weight`, `input`, `output` -> settings (see `tensor_scheme`).
        recipe: Keys of `Recipe` that differ for these linears.
    """

    pattern: str
    algorithm: str | None = None
    operands: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)


def tensor_scheme(settings: Mapping[str, Any], path: str) -> TensorScheme:
    """One operand's scheme from a configuration, such as `{format: int4, granularity: group:64}`.

    Args:
        settings: `format` (a name of `formats.FORMATS`), `granularity` (tensor, channel, token,
            group:<size>, block:<size>), and optionally `scale` (float32, bfloat16, e8m0, e4m3),
            `dynamic`, `asymmetric`, `exponent` (floor, nearest, ceil).
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
    if scale not in SCALES:
        raise UserError(f"config: {path}.scale={scale!r} is unknown; {nearest_hint(scale, SCALES)}")
    flags = {key: settings.get(key) or False for key in ("dynamic", "asymmetric")}
    for key, value in flags.items():
        if not isinstance(value, bool):
            raise UserError(f"config: {path}.{key}={value!r} must be true or false.")
    try:
        return TensorScheme(
            FORMATS[name],
            granularity_from_str(str(settings["granularity"])),
            SCALES[scale],
            is_dynamic=flags["dynamic"],
            is_asymmetric=flags["asymmetric"],
            exponent=settings.get("exponent") or "floor",
        )
    except ValueError as error:
        raise UserError(f"config: {path}: {error}") from error


def _check_table(name: str, algorithm: Algorithm, model: DecoderConfig) -> None:
    """Refuses what a vocabulary table cannot do.

    Raises:
        ValueError: Names the table, the setting, and what would work.
    """
    scheme = algorithm.scheme
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
    if algorithm.recipe.changes_anything:
        raise UserError(
            f"quantization.rules: {name} cannot go through a recipe ({algorithm.recipe}); it is rounded "
            "to nearest with the scales of its maxima. Choose an algorithm without one, such as int4."
        )
    weight = scheme.weight
    if weight is None or not isinstance(weight.granularity, PerChannel | PerGroup):
        found = None if weight is None else str(weight.granularity)
        raise UserError(
            f"quantization.rules: {name}.weight has granularity {found!r}; rows of the vocabulary are "
            "padded and cut over ranks, so it must be 'channel' or 'group:<size>'."
        )


def _check_router(pattern: str, names: Sequence[str], model: DecoderConfig) -> None:
    """Refuses a rule that names routers, or gates of shared experts, and nothing else."""
    if model.router is None or any(fnmatchcase(name, pattern) for name in names):
        return
    routers = {in_layer(i, model.router.name) for i in range(model.num_layers)}
    gates = {
        in_layer(i, x.name) for i in range(model.num_layers) for x in model.selectors_of(i)
    } | routers
    if any(fnmatchcase(name, pattern) for name in gates):
        kind = "routers" if any(fnmatchcase(n, pattern) for n in routers) else "gates of experts"
        raise UserError(
            f"quantization.rules: pattern {pattern!r} names {kind}, which are never quantized: a code "
            "off by one would send tokens to other experts. Leave the rule out."
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
        recipe: Keys of `Recipe` for all linears whose rule does not name an algorithm with a recipe.
    """

    algorithm: str
    group_size: int | None = None
    rules: Sequence[Rule] = field(default=())
    kv_cache: str | None = None
    kv_cache_scales: str = "shared"
    disabled: Sequence[str] = field(default=())
    recipe: Mapping[str, Any] = field(default_factory=dict)

    def schemes(self, model: DecoderConfig) -> dict[str, Scheme]:
        """Global name -> scheme, of linears, tables and caches."""
        found: dict[str, Scheme] = {n: a.scheme for n, a in self.resolve(model).items()}
        return found | self.cache_schemes(model)

    def cache_schemes(self, model: DecoderConfig) -> dict[str, KvCacheScheme]:
        """Global name -> scheme of every layer's cache; empty: not quantized."""
        if self.kv_cache is None:
            return {}
        cache = kv_cache_scheme(self.kv_cache, self.kv_cache_scales)
        return {in_layer(i, CORE_ATTENTION.name): cache for i in range(model.num_layers)}

    def resolve(self, model: DecoderConfig) -> dict[str, Algorithm]:
        """Global name -> algorithm: linears in model order, tables; what is unquantized is absent.

        Raises:
            ValueError: Unknown algorithm, operand settings or recipe, a pattern that matches nothing,
                or a vocabulary table that cannot be quantized like that.
        """
        names = [in_layer(i, x.name) for i in range(model.num_layers) for x in model.linears_of(i)]
        tables = [table.name for table in TABLES]
        for rule in self.rules:
            _check_router(rule.pattern, names, model)
            if rule.pattern not in tables and not any(fnmatchcase(n, rule.pattern) for n in names):
                raise UserError(
                    f"quantization.rules: pattern {rule.pattern!r} matches no linear. Names look "
                    f"like {names[0]!r}; vocabulary tables are quantized only by a rule that says "
                    f"exactly {' or '.join(tables)}."
                )
        default = named_algorithm(self.algorithm, group_size=self.group_size)
        if default is not None:
            default = replace(default, recipe=self._with_own_keys(default.recipe))
        by_pattern = [
            (rule.pattern, self._of_rule(f"quantization.rules[{index}]", rule))
            for index, rule in enumerate(self.rules)
        ]
        found: dict[str, Algorithm] = {}
        for name in names:
            matching = (algorithm for p, algorithm in by_pattern if fnmatchcase(name, p))
            algorithm = next(matching, default)
            if algorithm is not None:
                found[name] = algorithm
        for name, chosen in found.items():
            if chosen.scheme.output is not None and is_expert(name):
                raise UserError(
                    f"quantization.rules: {name} has no output to quantize: what experts return is "
                    "added up over ranks first. Quantize weight and input only."
                )
        for table in tables:
            algorithm = next((algorithm for p, algorithm in by_pattern if p == table), None)
            if algorithm is not None:
                _check_table(table, algorithm, model)
                found[table] = algorithm
        return self._without_disabled(found, names)

    def _with_own_keys(self, recipe: Recipe) -> Recipe:
        return recipe.with_keys(self.recipe, "quantization")

    def _without_disabled(
        self, algorithms: dict[str, Algorithm], names: Sequence[str]
    ) -> dict[str, Algorithm]:
        operands = [f"{n}.{kind}" for n, a in algorithms.items() for kind in a.scheme.operands]
        for pattern in self.disabled:
            if not any(fnmatchcase(operand, pattern) for operand in operands):
                raise UserError(
                    f"quantization.disabled: pattern {pattern!r} matches nothing that is quantized. "
                    f"Names look like {next(iter(operands), names[0] + '.input')!r}."
                )
        kept: dict[str, Algorithm] = {}
        for name, algorithm in algorithms.items():
            left = {
                kind: operand
                for kind, operand in algorithm.scheme.operands.items()
                if not any(fnmatchcase(f"{name}.{kind}", pattern) for pattern in self.disabled)
            }
            if left == algorithm.scheme.operands:
                kept[name] = algorithm
            elif left:
                kept[name] = replace(algorithm, scheme=_custom_scheme(left))
        return kept

    def _of_rule(self, path: str, rule: Rule) -> Algorithm | None:
        if rule.algorithm is not None and rule.operands:
            raise UserError(
                f"config: {path} has both algorithm={rule.algorithm!r} and "
                f"{', '.join(rule.operands)}; a rule names an algorithm or composes its own."
            )
        if rule.operands:
            found: Algorithm | None = Algorithm(_composed_scheme(rule.operands, path))
        else:
            found = named_algorithm(rule.algorithm or "null", group_size=self.group_size)
        if found is None:
            if rule.recipe:
                raise UserError(
                    f"config: {path} has a recipe, but quantizes nothing; give it an algorithm too."
                )
            return None
        is_table = rule.pattern in [table.name for table in TABLES]
        recipe = found.recipe
        if recipe == Recipe() and not is_table:
            recipe = self._with_own_keys(recipe)
        return replace(found, recipe=recipe.with_keys(rule.recipe, f"{path}.recipe"))


def _custom_scheme(operands: Mapping[str, TensorScheme]) -> LinearScheme:
    return LinearScheme(
        "custom", operands.get("weight"), operands.get("input"), operands.get("output")
    )


def _composed_scheme(operands: Mapping[str, Mapping[str, Any]], path: str) -> LinearScheme:
    """A rule's scheme from its operands' settings."""
    kinds = ("weight", "input", "output")
    for kind in operands:
        if kind not in kinds:
            hint = nearest_hint(kind, kinds)
            raise UserError(f"config: unknown key {f'{path}.{kind}'!r}; {hint}")
    parts = {kind: tensor_scheme(given, f"{path}.{kind}") for kind, given in operands.items()}
    try:
        return _custom_scheme(parts)
    except ValueError as error:
        raise UserError(f"config: {path}.{error}") from error

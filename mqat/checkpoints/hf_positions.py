"""What a Hugging Face `config.json` says about positions and attention: scalings, windows, caps.

Sources: transformers 5.24 and 4.57, `modeling_rope_utils.py` and `models/{mistral,qwen2,qwen3,phi3,
gemma2,gemma3}`. What the two versions read differently is refused.
"""

from collections.abc import Callable, Mapping
from typing import Any

from mqat.checkpoints.values import flag, is_positive, is_whole, positive, whole
from mqat.errors import UserError
from mqat.models.family import HF_ATTENTION, Family

_ORIGINAL = "original_max_position_embeddings"
_LAYER_TYPES = ("sliding_attention", "full_attention")


def _is_list(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(is_positive, value))


def _is_length(value: Any) -> bool:
    return is_whole(value, 1)


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


Rule = tuple[Callable[[Any], bool], str]
_NUMBER: Rule = is_positive, "a positive number"
_LENGTH: Rule = _is_length, "a positive integer"
_FLAG: Rule = _is_flag, "true or false"
_LIST: Rule = _is_list, "a list of positive numbers"
# rope_type -> keys that it needs, and keys that it may have; what others have is not read for it.
SCALINGS: dict[str, tuple[dict[str, Rule], dict[str, Rule]]] = {
    "default": ({}, {}),
    "linear": ({"factor": _NUMBER}, {}),
    "dynamic": ({"factor": _NUMBER}, {}),
    "llama3": (
        {"factor": _NUMBER, "low_freq_factor": _NUMBER, "high_freq_factor": _NUMBER, _ORIGINAL: _NUMBER},
        {},
    ),
    "yarn": (
        {"factor": _NUMBER},
        {
            _ORIGINAL: _LENGTH, "attention_factor": _NUMBER, "beta_fast": _NUMBER,
            "beta_slow": _NUMBER, "mscale": _NUMBER, "mscale_all_dim": _NUMBER, "truncate": _FLAG,
        },
    ),
    "longrope": (
        {_ORIGINAL: _LENGTH, "short_factor": _LIST, "long_factor": _LIST},
        {"attention_factor": _NUMBER, "factor": _NUMBER},
    ),
}  # fmt: skip
# Read for some other type only, so that they change nothing; but not a factor, which is meant to.
_HARMLESS = {
    "truncate", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "finetuned",
}  # fmt: skip
# Keys that other scalings have at the top of config.json.
_OUTSIDE = ("rope_theta", "rope_type", "type", "partial_rotary_factor")


def positions(family: Family, hf: Mapping[str, Any], layers: int, head_dim: int) -> dict[str, Any]:
    """Fields of `DecoderConfig`: rotary positions, windows, scale and caps of scores and logits.

    Args:
        family: Of the model.
        hf: Its `config.json`.
        layers: Their number.
        head_dim: Channels of a head.

    Raises:
        UserError: A key is wrong, contradicts another, or is not honoured.
    """
    window, windowed = _window(family, hf, layers)
    found: dict[str, Any] = {"sliding_window": window, "windowed_layers": windowed}
    for key, default in family.attention.items():
        value = hf.get(key, default)
        is_cap = key.endswith("_softcapping")  # transformers 5 takes no integer
        is_right = is_positive(value) and not (is_cap and isinstance(value, int))
        if not is_right and not (value is None and is_cap):
            rule = "a positive number" + " with a decimal point, or null" * is_cap
            raise UserError(f"config.json: {key} is {value!r}, must be {rule}.")
        found[HF_ATTENTION[key]] = value
    if (scalar := found.get("attention_scale")) is not None:
        found["attention_scale"] = None if scalar == head_dim else float(scalar) ** -0.5
    nested = _by_layer_type(hf)
    if nested is not None:
        if "windowed_rope_theta" not in found:
            raise UserError(
                "config.json: rope_parameters differ by layer type, which models of model_type "
                f"{family.name!r} do not have."
            )
        own = nested["sliding_attention"]
        if _scaling(family, "rope_parameters.sliding_attention", own, hf) is not None:
            raise UserError(
                f"config.json: rope_parameters.sliding_attention={own!r}: positions of windowed layers "
                "are never scaled."
            )
        found["windowed_rope_theta"] = positive(
            own, "rope_theta", "rope_parameters.sliding_attention."
        )
        hf = {**hf, "rope_parameters": nested["full_attention"]}
    if not windowed:
        found.pop("windowed_rope_theta", None)
    theta, scaling, fraction = _rope(family, hf)
    rotated = int(head_dim * fraction)
    for key in ("short_factor", "long_factor"):
        if scaling and key in scaling and len(scaling[key]) != rotated // 2:
            raise UserError(
                f"config.json: {key} has {len(scaling[key])} numbers, but {rotated} of {head_dim} "
                f"channels are rotated, in {rotated // 2} pairs."
            )
    return found | {"rope_theta": theta, "rope_scaling": scaling, "rotary_fraction": fraction}


def _by_layer_type(hf: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """`rope_parameters` of transformers 5 with an entry for each layer type; None: of another form."""
    given = hf.get("rope_parameters")
    if not isinstance(given, Mapping) or not {*given} & {*_LAYER_TYPES}:
        return None
    if {*given} != {*_LAYER_TYPES} or not all(isinstance(v, Mapping) for v in given.values()):
        raise UserError(
            f"config.json: rope_parameters={given!r}: must be one object, or one for each of "
            f"{', '.join(_LAYER_TYPES)}."
        )
    return given


def _window(family: Family, hf: Mapping[str, Any], layers: int) -> tuple[int | None, list[int]]:
    """The window, and which layers have it."""
    types, told, size = hf.get("layer_types"), family.window, None
    is_listed = isinstance(types, list) and len(types) == layers
    known = is_listed and all(kind in _LAYER_TYPES for kind in types or [])
    if types is not None and not known:
        raise UserError(
            f"config.json: layer_types={types!r}: must be one of {', '.join(_LAYER_TYPES)} for each "
            f"of {layers} layers."
        )
    if told is not None and (told.switch is None or flag(hf, told.switch)):
        # A pattern of layers needs a number even where no layer of it has the window.
        is_none = hf.get("sliding_window", told.default) is None and told.every is None
        default = None if told.every is not None and "sliding_window" in hf else told.default
        size = None if is_none else whole(hf, "sliding_window", default)
    windowed = [] if size is None else _windowed_layers(family, hf, layers)
    listed = [layer for layer, kind in enumerate(types or []) if kind == "sliding_attention"]
    if types is not None and told is not None and size is not None and not told.is_of_all_layers:
        windowed = listed
    if types is not None and listed != windowed:
        raise UserError(
            f"config.json: layer_types={types!r}, but sliding_window="
            f"{hf.get('sliding_window')!r} of a {family.name} model is of the layers {windowed}."
        )
    return (size, windowed) if windowed else (None, [])


def _windowed_layers(family: Family, hf: Mapping[str, Any], layers: int) -> list[int]:
    """Where `layer_types` does not say it."""
    told = family.window
    if told is not None and told.every is not None:
        key, every = told.every
        every = every if key is None or key not in hf else whole(hf, key)
        return [layer for layer in range(layers) if (layer + 1) % every]
    if told is not None and told.first_layer is not None:
        return list(range(layers))[whole(hf, *told.first_layer, least=0) :]
    return list(range(layers))


def _rope(family: Family, hf: Mapping[str, Any]) -> tuple[float, dict[str, Any] | None, float]:
    """Base; the scaling in one spelling, None where there is none; which part of a head is rotated."""
    names = ("rope_scaling", "rope_parameters")
    given = {key: hf[key] for key in names if hf.get(key) not in (None, {})}
    scalings = [_scaling(family, key, value, hf) for key, value in given.items()]
    places = [hf, *given.values()]
    thetas = {positive(where, "rope_theta") for where in places if "rope_theta" in where}
    name = "partial_rotary_factor"
    parts = {positive(where, name) for where in places if where.get(name) is not None}
    if len(thetas) > 1 or len(parts) > 1 or any(s != scalings[0] for s in scalings):
        told = given | {key: hf[key] for key in ("rope_theta", name) if key in hf}
        raise UserError(
            f"config.json: {told} contradict each other, and versions of transformers differ in which "
            "they follow; keep the one that is meant."
        )
    fraction = next(iter(parts), family.rotary_fraction or 1.0)
    if fraction > 1 or (family.rotary_fraction is None and fraction != 1):
        raise UserError(
            f"config.json: {name}={fraction} is not honoured in models of model_type {family.name!r}."
        )
    return next(iter(thetas), family.rope_theta), scalings[0] if scalings else None, fraction


def _scaling(family: Family, key: str, rope: Any, hf: Mapping[str, Any]) -> dict[str, Any] | None:
    """One of `SCALINGS`: its name and its keys, in one order."""
    if not isinstance(rope, Mapping):
        raise UserError(f"config.json: {key}={rope!r}: must be an object or null.")
    kinds = [rope[word] for word in ("rope_type", "type") if rope.get(word) is not None]
    kind = kinds[0] if kinds else "default"
    if not isinstance(kind, str) or kind not in SCALINGS or any(o != kind for o in kinds):
        told = " and ".join(map(repr, kinds))
        raise UserError(f"rope_type={told}: supported are {', '.join(map(repr, SCALINGS))}.")
    if kind != "default" and family.rope_scalings is not None and kind not in family.rope_scalings:
        raise UserError(
            f"config.json: {key}: rope_type {kind!r} is none that transformers takes for models of "
            f"model_type {family.name!r}; supported are default, {', '.join(family.rope_scalings)}."
        )
    needed, optional = SCALINGS[kind]
    rope = {word: value for word, value in rope.items() if value is not None}
    if kind == "longrope" and hf.get(_ORIGINAL) is not None:
        rope.setdefault(_ORIGINAL, hf[_ORIGINAL])
    for word, value in rope.items():
        if word not in {*_OUTSIDE, *needed, *optional, *_HARMLESS}:
            raise UserError(
                f"config.json: {key}.{word}={value!r} is not honoured for rope_type {kind!r}."
            )
    found: dict[str, Any] = {"rope_type": kind}
    for word, (is_right, rule) in (needed | optional).items():
        if word not in rope and word in optional:
            continue
        if not is_right(rope.get(word)):
            told = repr(rope[word]) if word in rope else "missing"
            raise UserError(f"config.json: {key}.{word} is {told}, must be {rule}.")
        found[word] = rope[word]
    _check_scaling(key, found, hf)
    return None if kind == "default" else found


def _check_scaling(key: str, rope: Mapping[str, Any], hf: Mapping[str, Any]) -> None:
    """Refuses factors that contradict each other, or that versions of transformers read differently."""
    kind = rope["rope_type"]
    if kind == "llama3" and rope["high_freq_factor"] <= rope["low_freq_factor"]:
        raise UserError(f"config.json: {key}.high_freq_factor must be above low_freq_factor.")
    outer, original = hf.get(_ORIGINAL), rope.get(_ORIGINAL)
    if kind in ("llama3", "yarn", "longrope") and outer not in (None, original):
        raise UserError(
            f"config.json: {_ORIGINAL}={outer!r}, but {key}.{_ORIGINAL} is {original!r}; versions of "
            "transformers differ in which they follow: write the one that is meant in both places."
        )
    factor, longest = rope.get("factor"), whole(hf, "max_position_embeddings")
    if kind in ("yarn", "longrope") and factor and original and factor != longest / original:
        raise UserError(
            f"config.json: {key}.factor={factor}, but max_position_embeddings={longest} is not "
            f"{factor} times {_ORIGINAL}={original}; versions of transformers follow one or the other. "
            f"Set max_position_embeddings to {round(factor * original)} if the factor is meant."
        )

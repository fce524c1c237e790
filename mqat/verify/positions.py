"""Positions and attention of an exported model: what its `config.json` says, and what that computes.

Formulas of their own, as a second opinion on `specs/`: angles in float64, attention under a whole mask.

Sources: transformers `modeling_rope_utils.py` and `models/{mistral,qwen2,gemma2,gemma3}`; TensorRT-LLM
`functional.py` (RopeEmbeddingUtils), `models/gemma/config.py`; YaRN, arXiv:2309.00071, appendix A.2.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Raw = Mapping[str, Any]
# Each n-th layer has no window: TensorRT-LLM's releases differ in the name of n.
WINDOW_PATTERN = ("sliding_window", "sliding_window_pattern", "_sliding_window_pattern")
_ORIGINAL = "original_max_position_embeddings"
# Numbers that a scaling needs, and those that it may have; lists have one for each pair of channels.
_NEEDED = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", _ORIGINAL),
    "yarn": ("factor",),
    "longrope": (_ORIGINAL,),
}
_OPTIONAL = {
    "yarn": (_ORIGINAL, "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
    "longrope": ("factor", "attention_factor"),
}
_OTHER = {"yarn": ("truncate",), "longrope": ("short_factor", "long_factor")}
# TensorRT-LLM's classes of these families read the others as no scaling, or not at all.
_SERVED_BY = {"hf": tuple(_NEEDED), "trtllm": ("linear", "dynamic", "llama3")}


def is_number(value: Any) -> bool:
    """Whether JSON gave a positive number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


@dataclass(frozen=True)
class Positions:
    """What attention of one model does with positions.

    Attributes:
        base: Of the rotary frequencies.
        scaling: `kind` and its numbers; empty: none.
        longest: Sequence that the model is for.
        rotated: Channels of a head that are rotated, from the first on.
        is_interleaved: Neighbours are rotated against each other, otherwise halves.
        window: Tokens that one looks at, itself included, in the layers `windowed`.
        windowed: Their global numbers.
        windowed_base: Base in them, without scaling; None: as elsewhere.
        score_scale: What scores are multiplied by.
        score_cap: c, where they become c tanh(s / c); None: they stay.
        logit_cap: The same of logits.
    """

    base: float
    scaling: Mapping[str, Any]
    longest: int
    rotated: int
    is_interleaved: bool
    window: int | None
    windowed: frozenset[int]
    windowed_base: float | None
    score_scale: float
    score_cap: float | None
    logit_cap: float | None

    @property
    def switching_length(self) -> int | None:
        """Tokens of a sequence beyond which all of it is turned otherwise; None: never."""
        return int(self.scaling[_ORIGINAL]) if self.scaling.get("kind") == "longrope" else None

    def has_window(self, layer: int) -> bool:
        """Whether a layer, by its global number, looks at near tokens only."""
        return layer in self.windowed

    def rotate(self, x: Tensor, layer: int, first: int = 0) -> Tensor:
        """Heads [b, h, s, d] turned by positions from `first` on, in a layer by its global number."""
        base, scaling = self.base, self.scaling
        if self.has_window(layer) and self.windowed_base is not None:
            base, scaling = self.windowed_base, {}
        length, size = first + x.shape[2], self.rotated
        rates, times = _rates(base, scaling, size, length, self.longest)
        angles = torch.arange(first, length).double()[:, None] * rates
        cos, sin = ((f(angles) * times).to(x.dtype) for f in (torch.cos, torch.sin))
        turned, rest = x[..., :size], x[..., size:]
        if self.is_interleaved:
            a, b = turned[..., 0::2], turned[..., 1::2]
        else:
            a, b = turned.chunk(2, dim=-1)
        pairs = (a * cos - b * sin, b * cos + a * sin)
        joined = (
            torch.stack(pairs, dim=-1).flatten(-2) if self.is_interleaved else torch.cat(pairs, -1)
        )
        return torch.cat([joined, rest], dim=-1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        """Heads [b, h, s, d] of the context, of queries that are the last of as many keys and values."""
        scores = q @ k.transpose(-2, -1) * self.score_scale
        if self.score_cap is not None:
            scores = self.score_cap * torch.tanh(scores / self.score_cap)
        place = torch.arange(k.shape[2])
        back = place[-q.shape[2] :, None] - place
        reach = self.window if self.window is not None and self.has_window(layer) else len(place)
        hidden = (back < 0) | (back >= reach)
        return scores.masked_fill(hidden, -math.inf).softmax(dim=-1) @ v

    def capped(self, logits: Tensor) -> Tensor:
        """Logits, as far as the model caps them."""
        cap = self.logit_cap
        return logits if cap is None else cap * torch.tanh(logits / cap)


def _rates(
    base: float, scaling: Mapping[str, Any], size: int, length: int, longest: int
) -> tuple[Tensor, float]:
    """Radians a token of each pair of channels, float64, and what cosine and sine are multiplied by."""
    kind, by = scaling.get("kind"), float(scaling.get("factor", 1.0))
    pair = torch.arange(size // 2).double()
    if kind == "dynamic":
        beyond = max(length / longest, 1.0)
        base = base * (by * beyond - by + 1) ** (size / (size - 2))
    rates = torch.exp(-math.log(base) * 2 * pair / size)
    if kind == "linear":
        return rates / by, 1.0
    if kind == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = scaling[_ORIGINAL] * rates / (2 * math.pi)
        return rates / by + (rates - rates / by) * ((turns - low) / (high - low)).clamp(0, 1), 1.0
    if kind == "yarn":
        bounds = []
        for beta in (scaling.get("beta_fast", 32), scaling.get("beta_slow", 1)):
            wave = scaling.get(_ORIGINAL, longest) / (beta * 2 * math.pi)
            bounds.append(size / 2 * math.log(wave) / math.log(base))
        if scaling.get("truncate", True):
            bounds = [float(math.floor(bounds[0])), float(math.ceil(bounds[1]))]
        low, high = max(bounds[0], 0.0), min(bounds[1], size - 1.0)
        slow = ((pair - low) / (high - low if high != low else 0.001)).clamp(0, 1)
        return rates * (1 - slow + slow / by), _yarn_times(scaling, by)
    if kind == "longrope":
        original = scaling[_ORIGINAL]
        divisors = scaling["long_factor" if length > original else "short_factor"]
        grown = float(scaling.get("factor", longest / original))
        usual = math.sqrt(1 + math.log(grown) / math.log(original)) if grown > 1 else 1.0
        times = float(scaling.get("attention_factor", usual))
        return rates / torch.tensor(divisors).double(), times
    return rates, 1.0


def _yarn_times(scaling: Mapping[str, Any], by: float) -> float:
    """Temperature of attention, as the root that queries and keys have each."""
    log = math.log(max(by, 1.0)) / 10
    above, below = scaling.get("mscale"), scaling.get("mscale_all_dim")
    usual = (1 + above * log) / (1 + below * log) if above and below else 1 + log
    return float(scaling.get("attention_factor", usual))


def read_positions(
    value: Callable[[str], Any], raw: Raw, facts: Mapping[str, Any], kind_key: str
) -> Positions:
    """Of a `config.json` without problems.

    Args:
        value: Its sizes, by their names in checkpoints.
        raw: The file.
        facts: `positions` of the family's facts, of the format.
        kind_key: What the format calls the kind of a scaling.
    """
    given, head = _given_scaling(value("rope_scaling"), raw, facts) or {}, value("head_dim")
    kind_key = facts.get("scaling_kind", kind_key)
    scaling = {key: item for key, item in given.items() if key != kind_key}
    window, windowed = _windowed(raw, facts, value("num_layers"))
    scalar = raw.get(facts.get("score_scalar", "")) or head
    return Positions(
        base=float(value("rope_theta") or facts.get("fixed_base", 1.0)),  # learned ones have none
        scaling={"kind": given[kind_key], **scaling} if given else {},
        longest=value("max_position_embeddings"),
        rotated=int(head * raw.get(facts.get("fraction", ""), facts.get("fixed_fraction", 1))),
        is_interleaved=bool(facts.get("is_interleaved")),
        window=window,
        windowed=frozenset(windowed),
        windowed_base=raw.get(facts.get("windowed_base", "")) if windowed else None,
        score_scale=scalar**-0.5,
        score_cap=raw.get(facts.get("score_cap", "")),
        logit_cap=raw.get(facts.get("logit_cap", "")),
    )


def _given_scaling(scaling: Any, raw: Raw, facts: Mapping[str, Any]) -> Any:
    """With the number that some families have outside of it."""
    if "scaling_original" not in facts or not isinstance(scaling, Mapping):
        return scaling
    return {_ORIGINAL: raw.get(facts["scaling_original"]), **scaling}


def _windowed(raw: Raw, facts: Mapping[str, Any], layers: int) -> tuple[int | None, list[int]]:
    """The window and its layers: all, those of `layer_types`, or all but each n-th."""
    how, size = facts.get("window"), raw.get("sliding_window")
    if how is None or size is None:
        return None, []
    if how == "every layer":
        return size, list(range(layers))
    if how == "layer_types":
        kinds = raw["layer_types"]
        return size, [n for n, kind in enumerate(kinds) if kind == "sliding_attention"]
    return size, [n for n in range(layers) if (n + 1) % raw[WINDOW_PATTERN[1]]]


def position_problems(
    raw: Raw, scaling: Any, facts: Mapping[str, Any], kind_key: str, form: str
) -> Iterator[str]:
    """What is wrong with the keys of positions; `scaling` is the value of the format's key."""
    kind_key = facts.get("scaling_kind", kind_key)
    yield from _scaling_problems(_given_scaling(scaling, raw, facts), kind_key, form)
    for name in ("fraction", "score_scalar", "windowed_base"):
        key = facts.get(name)
        if key is not None and not is_number(raw.get(key)):
            yield f"{key}={raw.get(key)!r}, expected a positive number"
    for name in ("score_cap", "logit_cap"):
        key = facts.get(name)
        if key is not None and (key not in raw or not (raw[key] is None or is_number(raw[key]))):
            yield f"{key}={raw.get(key)!r}, expected a positive number or null"
    how, size = facts.get("window"), raw.get("sliding_window")
    is_size = isinstance(size, int) and is_number(size)
    if how is not None and ("sliding_window" not in raw or not (size is None or is_size)):
        yield f"sliding_window={size!r}, expected a positive integer or null"
    switch = facts.get("window_switch")
    if switch is not None and raw.get(switch) is not (size is not None):
        yield f"{switch}={raw.get(switch)!r} with sliding_window={size!r}"
    kinds, layers = raw.get("layer_types"), raw.get("num_hidden_layers")
    allowed = ("sliding_attention", "full_attention")
    known = isinstance(kinds, list) and len(kinds) == layers and all(k in allowed for k in kinds)
    if how == "layer_types" and size is not None and not known:
        yield f"layer_types={kinds!r}, expected sliding_attention or full_attention for each layer"
    patterns = [raw.get(key) for key in WINDOW_PATTERN[1:]]
    if how == "pattern" and (patterns[0] != patterns[1] or not is_number(patterns[0])):
        yield f"{WINDOW_PATTERN[1:]}={patterns}, expected the same positive integer"


def _scaling_problems(scaling: Any, kind_key: str, form: str) -> Iterator[str]:
    if scaling is None:
        return
    kind = scaling.get(kind_key) if isinstance(scaling, Mapping) else None
    if kind not in _SERVED_BY[form]:
        yield f"rope scaling {scaling!r}: expected null, or {kind_key} one of {_SERVED_BY[form]}"
        return
    numbers, other = _NEEDED[kind] + _OPTIONAL.get(kind, ()), _OTHER.get(kind, ())
    for key in sorted({*scaling} - {kind_key, "type", "rope_type", *numbers, *other}):
        yield f"rope scaling {kind}: unknown key {key!r}"
    for key in numbers:
        if (key in scaling or key in _NEEDED[kind]) and not is_number(scaling.get(key)):
            yield f"rope scaling {kind}: {key}={scaling.get(key)!r}, expected a positive number"
    for key in other if kind == "longrope" else ():
        listed = scaling.get(key)
        if not isinstance(listed, list) or not listed or not all(map(is_number, listed)):
            yield f"rope scaling {kind}: {key}={listed!r}, expected positive numbers"
    numeric = is_number(scaling.get("high_freq_factor")) and is_number(
        scaling.get("low_freq_factor")
    )
    if kind == "llama3" and numeric and scaling["high_freq_factor"] <= scaling["low_freq_factor"]:
        yield "rope scaling llama3: high_freq_factor must be above low_freq_factor"

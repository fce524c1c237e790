"""ModelOpt's `quantization_config` and `hf_quant_config.json`, which say the same."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mqat.verify.served_model import ServedModel, is_positive
from mqat.verify.storage import Storage

_FILE = "hf_quant_config.json"
_CODES = {"codes": "weight", "scale": "weight_scale"}
_STATIC = {"input_scale": "input_scale"}
_FP8 = Storage(_CODES | _STATIC, 8, True, "tensor", "static fp8", scalar=())
_AWQ = Storage(
    _CODES | {"smoothing": "pre_quant_scale"}, 4, granularity="group:128", packing="rows", scalar=()
)
# `quant_algo` -> storage, up to the group size.
_ALGORITHMS = {
    "FP8": _FP8,
    "FP8_PER_CHANNEL_PER_TOKEN": replace(
        _FP8, names=_CODES, granularity="channel", input="token fp8"
    ),
    "NVFP4": Storage(
        _CODES | {"global_scale": "weight_scale_2", "input_global_scale": "input_scale"},
        4, True, "group:16", "block fp4", packing="columns", scalar=(),
    ),
    "W4A16_AWQ": _AWQ,
    "W4A8_AWQ": replace(
        _AWQ, names=_AWQ.names | _STATIC | {"range_scale": "weight_scale_2"}, input="static fp8"
    ),
}  # fmt: skip
_FP8_CACHE = {"num_bits": 8, "type": "float", "dynamic": False}


def read(
    directory: Path, config: Mapping[str, Any], model: ServedModel, problems: list[str]
) -> tuple[dict[str, Storage], bool]:
    """How quantized linears are stored, by full name, and whether the cache is FP8.

    Args:
        directory: Holds the configuration twice.
        config: `quantization_config` of `config.json`.
        model: That the rest of it describes.
        problems: Complaints go here.
    """
    try:
        other = json.loads((directory / _FILE).read_text("utf-8"))["quantization"]
        algorithm, excluded = other["quant_algo"], other["exclude_modules"]
        cache = other["kv_cache_quant_algo"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        problems.append(f"{_FILE} beside it is missing or unusable ({error!r})")
        return {}, False
    told = config.get("kv_cache_scheme")
    if (cache, told) not in ((None, None), ("FP8", _FP8_CACHE)):
        problems.append(
            f"kv_cache_scheme={told} with kv_cache_quant_algo={cache!r}, expected null with null or "
            f"{_FP8_CACHE} with 'FP8'"
        )
    if (algorithm, excluded) != (config.get("quant_algo"), config.get("ignore")):
        problems.append(f"quantization_config and {_FILE} disagree")
    elif algorithm not in _ALGORITHMS or model.names["lm_head"] not in excluded:
        problems.append(f"quant_algo={algorithm!r} with exclusions {excluded} is not verified here")
    else:
        found, size = _ALGORITHMS[algorithm], other.get("group_size")
        if found.group_size and not is_positive(size):
            problems.append(f"{_FILE}: group_size={size!r}, expected a positive integer")
        elif found.group_size:
            found = replace(found, granularity=f"group:{size}", scale_dtypes=(model.dtype,))
        options = (other.get("pre_quant_scale"), other.get("has_zero_point"))
        if "smoothing" in found.names and options != (True, False):
            problems.append(f"{_FILE}: AWQ needs pre_quant_scale true and has_zero_point false")
        return {
            name: found for name in model.linear_names() if name not in excluded
        }, cache is not None
    return {}, False

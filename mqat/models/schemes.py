"""The schemes of a whole model, by kind: linears, vocabulary tables, caches."""

from collections.abc import Mapping
from typing import Any

from mqat.models.structure import is_in_layer
from mqat.quant.kv_cache import KvCacheScheme, kv_cache_scheme
from mqat.quant.scheme import LinearScheme

Scheme = LinearScheme | KvCacheScheme


def scheme_from_dict(values: Mapping[str, Any]) -> Scheme:
    """Inverse of the `to_dict` of either kind."""
    if "kv_cache" not in values:
        return LinearScheme.from_dict(values)
    return kv_cache_scheme(values["kv_cache"], "shared" if values["is_shared"] else "separate")


def linear_schemes(schemes: Mapping[str, Scheme]) -> dict[str, LinearScheme]:
    """Those of the decoder's linears."""
    found = {name: s for name, s in schemes.items() if isinstance(s, LinearScheme)}
    return {name: s for name, s in found.items() if is_in_layer(name)}


def table_schemes(schemes: Mapping[str, Scheme]) -> dict[str, LinearScheme]:
    """Those of vocabulary tables: the embedding, the output layer."""
    found = {name: s for name, s in schemes.items() if isinstance(s, LinearScheme)}
    return {name: s for name, s in found.items() if not is_in_layer(name)}


def kv_cache_schemes(schemes: Mapping[str, Scheme]) -> dict[str, KvCacheScheme]:
    """Those of caches."""
    return {name: s for name, s in schemes.items() if isinstance(s, KvCacheScheme)}

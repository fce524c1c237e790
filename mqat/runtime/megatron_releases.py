"""What differs between the releases of Megatron-Core that mqat runs on; nothing else asks for one.

| since | what differs                                  | here, or how it is met               |
|-------|-----------------------------------------------|--------------------------------------|
| 0.17  | slots of a layer spec are called; specs, too  | classes and `ModuleSpec` serve both  |
| 0.18  | the MLP of a spec is a `functools.partial`    | `submodules_of`, `with_submodules`   |
| 0.18  | linears are handed their Megatron `name`      | ours is called `quantized_name`      |
| 0.18  | an activation function must be a module       | `specs.elementwise.Swiglu` is one    |
| 0.19  | weights can be cut over ranks besides TP      | refused by `QuantizedLinear`         |
| 0.19  | `torch.cuda.current_stream` in gradient syncs | bridged in `runtime.cpu`             |

Newer releases need Python 3.12.
"""

import functools
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from mqat.errors import UserError

OLDEST, TOO_NEW = (0, 16, 1), (0, 20)


def check_release() -> None:
    """Refuses a Megatron-Core that mqat was not tried with.

    Raises:
        UserError: Names the installed release and the range.
    """
    wanted = (
        f"mqat needs megatron-core>={'.'.join(map(str, OLDEST))},<{'.'.join(map(str, TOO_NEW))}"
    )
    try:
        installed = version("megatron-core")
    except PackageNotFoundError:
        raise UserError(f"megatron-core is not installed: {wanted}; install it with pip.") from None
    numbers = tuple(int(part) for part in installed.split(".")[:3] if part.isdigit())
    if not OLDEST <= numbers < TOO_NEW:
        raise UserError(f"megatron-core {installed} is installed: {wanted}; install one of these.")


def submodules_of(spec: Any) -> Any:
    """The submodules of a `ModuleSpec` or of a builder that has them bound; None: neither."""
    if isinstance(spec, functools.partial):
        return spec.keywords.get("submodules")
    return getattr(spec, "submodules", None)


def with_submodules(spec: Any, submodules: Any) -> Any:
    """A copy of either with other submodules."""
    if isinstance(spec, functools.partial):
        keywords = spec.keywords | {"submodules": submodules}
        return functools.partial(spec.func, *spec.args, **keywords)
    return replace(spec, submodules=submodules)

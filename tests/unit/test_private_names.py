"""Private names of torch and Python that mqat uses, in one table: what it relies on, and a test of that.

A release that renames or changes one fails here by name, not in the middle of somebody's training.
"""

import argparse
import ast
import math
import multiprocessing.spawn
import sys
import types
from pathlib import Path

import pytest
import torch
from megatron.core.models.common.embeddings import yarn_rotary_pos_embedding as yarn

from mqat.parallel import activated_linear

ROOT = Path(__file__).parents[2] / "mqat"


def _int_mm():
    codes = torch.randint(-128, 128, (32, 64), dtype=torch.int8)
    product = torch._int_mm(codes, codes[:16].t())
    assert product.dtype == torch.int32
    assert torch.equal(product, (codes.long() @ codes[:16].t().long()).int())


def _int8pack_mm():
    x, codes = torch.randn(4, 64).bfloat16(), torch.randint(-128, 128, (32, 64), dtype=torch.int8)
    ones = torch.ones(32, dtype=torch.bfloat16)
    expected = x.double() @ codes.double().t()
    product = torch._weight_int8pack_mm(x, codes, ones)
    assert torch.allclose(product.double(), expected, rtol=2**-7, atol=2.0)


def _scaled_mm():
    schema = torch.ops.aten._scaled_mm.default._schema
    names = [argument.name for argument in schema.arguments]
    assert names[:4] == ["self", "mat2", "scale_a", "scale_b"]
    assert {"out_dtype", "use_fast_accum"} <= set(names)
    fp8 = [torch.empty(32, 16, device="meta").to(torch.float8_e4m3fn) for _ in range(2)]
    rows = torch.ones(32, 1, device="meta")
    product = torch._scaled_mm(
        fp8[0], fp8[1].t(), scale_a=rows, scale_b=rows.t(), out_dtype=torch.bfloat16
    )
    assert product.shape == (32, 32) and product.dtype == torch.bfloat16


def _int4pack_mm():
    x, codes = torch.randn(4, 64).bfloat16(), torch.randint(0, 16, (64, 64), dtype=torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    pairs = torch.stack([torch.ones(2, 64), torch.zeros(2, 64)], dim=-1).bfloat16()
    product = torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, 32, pairs)
    assert torch.allclose(product.double(), x.double() @ (codes - 8).double().t(), atol=0.5)


def _is_bool(function):
    def check():
        assert isinstance(function(), bool)

    return check


def _has_any_global_hook():
    module = torch.nn.modules.module
    assert not module._has_any_global_hook()
    handle = module.register_module_forward_hook(lambda *_: None)
    assert module._has_any_global_hook()
    handle.remove()


def _hooks_of_a_module():
    module = torch.nn.Linear(1, 1)
    registered = {
        "_forward_pre_hooks": module.register_forward_pre_hook,
        "_forward_hooks": module.register_forward_hook,
        "_backward_pre_hooks": module.register_full_backward_pre_hook,
        "_backward_hooks": module.register_full_backward_hook,
    }
    assert tuple(registered) == activated_linear._HOOKS
    for name, register in registered.items():
        register(print)
        assert list(getattr(module, name).values()) == [print]


def _subparsers():
    parser = argparse.ArgumentParser()
    below = parser.add_subparsers().add_parser("name")
    (action,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    assert action.choices == {"name": below}


def _fused_sdp_choice():
    q = torch.randn(1, 4, 8, 16)
    choice = torch._fused_sdp_choice(q, q[:, :2], q[:, :2], is_causal=True, enable_gqa=True)
    assert choice in {
        int(backend) for backend in torch.nn.attention.SDPBackend.__members__.values()
    }


def _recompile_limit():
    assert torch._dynamo.config.recompile_limit >= 1


def _will_engine_execute_node():
    seen = []

    class Probe(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.leaf = x
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            try:
                seen.append(torch._C._will_engine_execute_node(ctx.next_functions[0][0]))
            except RuntimeError:
                seen.append("collected")
            return grad * 2

    x = torch.ones(1, requires_grad=True)
    Probe.apply(x).backward()
    torch.autograd.grad(Probe.apply(x), x)
    assert seen == [True, "collected"]


def _abort_process_group():
    assert callable(torch.distributed.distributed_c10d._abort_process_group)


def _getframe():
    assert sys._getframe(0).f_globals["__name__"] == __name__


def _inheriting():  # what it tells is tested with a whole script, in tests/users
    source = Path(multiprocessing.spawn.__file__).read_text("utf-8")
    assert "process.current_process()._inheriting = True" in source


def _yarn_factor():
    config = types.SimpleNamespace(yarn_rotary_scaling_factor=math.exp(10), yarn_mscale=0.25,
                                   yarn_mscale_all_dim=0.0)  # fmt: skip
    assert math.isclose(yarn._yarn_get_concentration_factor_from_config(config), 1.25)
    assert yarn._yarn_get_concentration_factor_from_config(types.SimpleNamespace()) == 1


def _storage_info():
    """Torch's own reader finds records by what mqat puts into an index."""
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    place = _StorageInfo("file", 3, 5)
    assert (place.relative_path, place.offset, place.length) == ("file", 3, 5)


PRIVATE = {
    f"{yarn.__name__}._yarn_get_concentration_factor_from_config": _yarn_factor,
    "sys._getframe": _getframe,
    "torch.distributed.distributed_c10d._abort_process_group": _abort_process_group,
    "torch.nn.modules.module._has_any_global_hook": _has_any_global_hook,
    "torch.nn.Module._forward_hooks": _hooks_of_a_module,  # and its like, by `getattr`
    "torch.distributed.checkpoint.filesystem._StorageInfo": _storage_info,
    "torch._C._will_engine_execute_node": _will_engine_execute_node,
    "torch._dynamo.config.recompile_limit": _recompile_limit,
    "argparse._SubParsersAction": _subparsers,
    "torch._fused_sdp_choice": _fused_sdp_choice,
    "torch._int_mm": _int_mm,
    "torch._scaled_mm": _scaled_mm,
    "torch._weight_int8pack_mm": _int8pack_mm,
    "torch.cpu._is_avx512_bf16_supported": _is_bool(torch.cpu._is_avx512_bf16_supported),
    "torch.cpu._is_vnni_supported": _is_bool(torch.cpu._is_vnni_supported),
    "torch.ops.aten._convert_weight_to_int4pack_for_cpu": _int4pack_mm,
    "torch.ops.aten._weight_int4pack_mm_for_cpu": _int4pack_mm,
    "torch.ops.mkldnn._is_mkldnn_bf16_supported": _is_bool(
        torch.ops.mkldnn._is_mkldnn_bf16_supported
    ),
    "multiprocessing.process._inheriting": _inheriting,  # by `getattr`
}
OWN = {"torch.cuda._mqat_cpu"}


def _imported(tree: ast.AST) -> dict[str, str]:
    """What names at the top of a module stand for, without mqat's own."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                full = alias.name if alias.asname else alias.name.split(".")[0]
                found[alias.asname or full] = full
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                found[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return {name: full for name, full in found.items() if full.split(".")[0] != "mqat"}


def _dotted(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Attribute):
        inner = _dotted(node.value)
        return [*inner, node.attr] if inner else []
    return [node.id] if isinstance(node, ast.Name) else []


def private_names(source: str) -> set[str]:
    """Names with a private part that a module reaches through its imports, at full length."""
    tree = ast.parse(source)
    imported, found = _imported(tree), set()
    inner = {node.value for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        first, *rest = _dotted(node) or [""]
        if isinstance(node, ast.Attribute) and node not in inner and first in imported:
            found.add(".".join([imported[first], *rest]))
    names = found | set(imported.values())
    return {name for name in names if any(p[0] == "_" and p[:2] != "__" for p in name.split("."))}


def test_the_table_has_every_private_name_in_use():
    sources = [path.read_text("utf-8") for path in sorted(ROOT.rglob("*.py"))]
    used = set().union(*map(private_names, sources))
    by_string = {"multiprocessing.process._inheriting", "torch.nn.Module._forward_hooks"}
    assert any('"_inheriting"' in source for source in sources)
    assert used - OWN == set(PRIVATE) - by_string


def test_the_search_sees_private_names():
    source = "import torch\nfrom a.b import _c\nx = torch._int_mm(torch.cuda._y.z, 1)"
    assert private_names(source) == {"torch._int_mm", "torch.cuda._y.z", "a.b._c"}


@pytest.mark.parametrize("name", PRIVATE)
def test_it_does_what_mqat_relies_on(name):
    PRIVATE[name]()

"""The tensors of a decoder as a server names and cuts them, planned before any is read."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain

import torch
from torch import Tensor

from mqat.checkpoints.reader import CheckpointReader
from mqat.errors import UserError
from mqat.export.forms import Form, Forms
from mqat.export.kv_cache import CacheForm
from mqat.export.reshard import (
    InferenceRank,
    linear_columns,
    linear_rows,
    row_chunks,
    table_rows,
)
from mqat.export.served_linear import ServedLinear
from mqat.export.stream import TensorPlan
from mqat.export.tensor_builders import TensorBuilders, bias, transposed, unquantized
from mqat.models.decoder import DecoderConfig
from mqat.models.experts import Selector
from mqat.models.family import Family
from mqat.models.schemes import Scheme, kv_cache_schemes, linear_schemes, table_schemes
from mqat.models.structure import Linear, Norm, Table, in_layer
from mqat.quant.scheme import LinearScheme


@dataclass(frozen=True)
class Naming:
    """A server's names of what the table of the model lists.

    Attributes:
        layer: Before those of a layer of a family, with its number as `{i}`.
        module: Of a norm or table; the tensor of a selector.
        linears: Modules of a trained linear -> the numbers of its parts in them.
        writes_tied_head: The head is written even where it is the embedding.
        adds_one: Norms hold what they multiply by, also where checkpoints hold that less one.
        transposes: Weights are stored as the table says for Hugging Face.
        router_dtype: Of routers' weights; None: the model's.
        stacks_experts: What experts of a layer have in one module are one tensor each, [experts, ...],
            but for
        of_all_experts: suffixes of tensors that all experts share: where they differ, the largest.
    """

    layer: Callable[[Family], str]
    module: Callable[[Norm | Selector | Table], str]
    linears: Callable[[Linear], Mapping[str, Sequence[int]]]
    writes_tied_head: bool
    adds_one: bool
    transposes: bool
    router_dtype: torch.dtype | None = None
    stacks_experts: bool = False
    of_all_experts: tuple[str, ...] = ()

    def schemes(
        self, model: DecoderConfig, layers: Mapping[str, LinearScheme], numbers: range
    ) -> dict[str, LinearScheme | None]:
        """Module -> scheme (None: unquantized) of linears of some layers, numbered from zero."""
        return {
            self.layer(model.architecture).format(i=local) + module: layers.get(
                in_layer(layer, linear.name)
            )
            for local, layer in enumerate(numbers)
            for linear in model.linears_of(layer)
            for module in self.linears(linear)
        }


@dataclass(frozen=True)
class DecoderTensors:
    """How a server holds a whole decoder."""

    naming: Naming
    forms: Forms[Form]
    cache: CacheForm

    def check(self, model: DecoderConfig, schemes: Mapping[str, Scheme]) -> None:
        """Refuses what no server here reads, and what this one does not.

        TensorRT-LLM excludes its vocabulary tables from every algorithm; the compressed-tensors and
        ModelOpt readers of vLLM and SGLang quantize linears, of which the head is none.

        Raises:
            UserError: Names the table, linear or cache, and what would work.
        """
        for name in table_schemes(schemes):
            raise UserError(
                f"quantization.rules: {name} is quantized, which no export format here holds: servers "
                "read embedding and head in the model's dtype and would compute other logits. Set "
                "export.format=null, or leave the rule out."
            )
        layers = linear_schemes(schemes)
        _check_experts(model, layers)
        self.forms.check(layers)
        self.cache.check(kv_cache_schemes(schemes), self.forms.server, has_linears=bool(layers))

    def plan(
        self, reader: CheckpointReader, rank: InferenceRank, dtype: torch.dtype
    ) -> list[TensorPlan]:
        """Everything that a rank holds, in model order; `dtype` is that of unquantized tensors."""
        model, naming = reader.model, self.naming
        family, head = model.architecture, model.architecture.output_layer
        plans = []
        if rank.is_first_stage:
            for table in family.tables[:-1]:
                plans.append(_plan_table(reader, naming.module(table), table, dtype, rank))
        for local, layer in enumerate(rank.layers(model)):
            prefix = naming.layer(family).format(i=local)
            plans += self._plan_layer(reader, rank, dtype, prefix, layer)
        if rank.is_last_stage:
            plans += self._plan_norm(reader, "", family.final_norm, None, dtype)
            table = family.embedding if model.tie_word_embeddings else head
            if naming.writes_tied_head or not model.tie_word_embeddings:
                plans.append(_plan_table(reader, naming.module(head), table, dtype, rank))
        return plans

    def _plan_layer(
        self,
        reader: CheckpointReader,
        rank: InferenceRank,
        dtype: torch.dtype,
        prefix: str,
        layer: int,
    ) -> Iterator[TensorPlan]:
        model, stacks = reader.model, dict[str, list[TensorPlan]]()
        for norm in model.norms_of(layer):
            yield from self._plan_norm(reader, prefix, norm, layer, dtype)
        for linear in model.linears_of(layer):
            cols = linear_columns(model, linear, rank)
            scheme = reader.layers.get(in_layer(layer, linear.name))
            for module, parts in self.naming.linears(linear).items():
                rows = linear_rows(model, linear, parts, rank)
                served = ServedLinear(reader, layer, linear, rows, cols, dtype)
                for suffix, build in self._builders(scheme, served).items():
                    plan = replace(build(served), name=f"{prefix}{module}.{suffix}")
                    if linear.expert is None or not self.naming.stacks_experts:
                        yield plan
                    else:
                        stacks.setdefault(plan.name, []).append(plan)
        for name, plans in stacks.items():
            is_one = name.rpartition(".")[2] in self.naming.of_all_experts
            yield _largest(plans) if is_one else _stacked(plans)
        for selector in model.selectors_of(layer):
            name, kind = prefix + self.naming.module(selector), self.naming.router_dtype or dtype
            yield _plan_selector(reader, selector, name, layer, kind)
        yield from self.cache.plan(reader, layer, prefix)

    def _builders(self, scheme: LinearScheme | None, served: ServedLinear) -> TensorBuilders:
        """Of one linear: those of its form, and the bias, which is the same in every form."""
        is_transposed = self.naming.transposes and served.linear.is_transposed_in_hf
        plain = {"weight": transposed if is_transposed else unquantized}
        builders = plain if scheme is None else self.forms.of(scheme).tensors
        return {**builders, "bias": bias} if served.has_bias else builders

    def _plan_norm(
        self,
        reader: CheckpointReader,
        prefix: str,
        norm: Norm,
        layer: int | None,
        dtype: torch.dtype,
    ) -> Iterator[TensorPlan]:
        """A norm's parameters: one layer's, or (None) the model's last."""
        family = reader.model.architecture
        shape = (reader.model.size(norm.size),)

        def chunks(key: str, offset: float) -> Iterator[Tensor]:
            key, region = (key, ()) if layer is None else reader.model.place(key, layer)
            values = reader.read(key, region)
            yield ((values.float() + offset) if offset else values).to(dtype)

        for kind in family.norm_kinds:
            is_weight = kind == "weight"
            offset = float(is_weight and family.zero_centered_gamma and self.naming.adds_one)
            make = partial(chunks, norm.key if is_weight else norm.bias_key, offset)
            yield TensorPlan(dtype, shape, make, f"{prefix}{self.naming.module(norm)}.{kind}")


def _check_experts(model: DecoderConfig, layers: Mapping[str, LinearScheme]) -> None:
    """Refuses experts of a layer that differ: servers compute all of them in one kernel.

    Raises:
        UserError: Names the two linears.
    """
    for layer in filter(model.has_experts, range(model.num_layers)):
        names = [in_layer(layer, x.name) for x in model.linears if x.expert is not None]
        for name in names[1:]:
            if layers.get(name) != layers.get(names[0]):
                raise UserError(
                    f"{name} is not quantized as {names[0]}, but servers compute all experts of a layer "
                    "in one kernel. Give them one rule, such as pattern '*.mlp.experts.*', or set "
                    "export.format=null."
                )


def _stacked(plans: Sequence[TensorPlan]) -> TensorPlan:
    """The tensors of one name of a layer's experts as one, whose first dimension is the expert."""
    shape = (len(plans), *plans[0].shape)
    return replace(
        plans[0], shape=shape, chunks=lambda: chain.from_iterable(p.chunks() for p in plans)
    )


def _largest(plans: Sequence[TensorPlan]) -> TensorPlan:
    """One small tensor in the place of several, element by element the largest."""

    def chunks() -> Iterator[Tensor]:
        yield torch.stack([chunk for plan in plans for chunk in plan.chunks()]).amax(dim=0)

    return replace(plans[0], chunks=chunks)


def _plan_selector(
    reader: CheckpointReader, selector: Selector, name: str, layer: int, dtype: torch.dtype
) -> TensorPlan:
    """A router's weight, or what is beside it."""
    shape = reader.model.selector_shape(selector)
    dtype = torch.float32 if selector.is_float32 else dtype

    def chunks() -> Iterator[Tensor]:
        yield reader.read(*reader.model.place(selector.key, layer)).view(shape).to(dtype)

    return TensorPlan(dtype, shape, chunks, name)


def _plan_table(
    reader: CheckpointReader, module: str, table: Table, dtype: torch.dtype, rank: InferenceRank
) -> TensorPlan:
    """A rank's rows of a table, then zero rows that make all ranks' equal."""
    rows, padding = table_rows(reader.model.size(table.rows), rank)
    width = reader.model.hidden_size

    def chunks() -> Iterator[Tensor]:
        for chunk in row_chunks([rows], width):
            for span in chunk:
                yield reader.view(table.key, (span,)).to(dtype)
        yield torch.zeros(padding, width, dtype=dtype)

    shape = (rows.stop - rows.start + padding, width)
    return TensorPlan(dtype, shape, chunks, f"{module}.weight")

"""Column- and row-parallel linears that compute with quantized operands.

Sharding and collectives stay in Megatron's classes; the seam is `_forward_impl`. Per-tensor input
scales make quantizing before the sequence-parallel gather give the same values for 1/tp of the work.
A linear is in one of four modes:

- fast (`quantized_gemm.py`): frozen and enabled quantizers, the weight's among them; codes are
  multiplied where both operands have them, and the weight is kept for the optimizer step
  (`quantized_step.py`).
- reference: both operands pass through their quantizers (identity until frozen and enabled), then
  Megatron's GEMM with its autograd function; the straight-through gradient is the quantizers' own.
- lowered (`pack_weights.py`): stored codes, for inference or as a frozen backbone; no float weights.
  A low-rank adapter (`lora.py`) goes with any of these: merged into the weight, or beside it.
- calibrating (no gradient): unquantized, layout-exact GEMMs (`exact.py`) under observation.

Dynamic scales of tokens whose features are cut over TP (input of row-parallel, output of
column-parallel) are the MAX over the group, one collective of a number a token ([S, B]) per call.
"""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

from mqat.errors import UserError
from mqat.kernels.packed_weight import PackedWeight, frozen_matmul, packed_matmul
from mqat.models.structure import is_in_layer
from mqat.parallel.exact import ordered_linear, sharded_linear
from mqat.parallel.linear_gradients import GradientNoise
from mqat.parallel.lora import Adapter
from mqat.parallel.quantized_gemm import (
    Deferred,
    Gemm,
    accumulated_by_megatron,
    quantized_matmul,
)
from mqat.parallel.quantized_module import QuantizedModule, quantized_modules
from mqat.parallel.reduce import all_reduce_fused_
from mqat.parallel.step_weights import GemmKind, WeightCache, encodes_input, gemm_kind
from mqat.quant.granularity import PerBlock, PerGroup, PerTensor, PerToken
from mqat.quant.quantizer import Quantizer
from mqat.quant.scheme import LinearScheme, TensorScheme

_OPERANDS = ("weight", "input", "output")


def _check_config(name: str, config: Any) -> None:
    """Refuses what a quantized linear would leave without effect, or compute something else under."""
    if getattr(config, "gtp_weight_remat_size", 1) > 1:
        raise UserError(
            f"{name}: gtp_weight_remat_size={config.gtp_weight_remat_size} cuts weights over ranks that "
            "gather them for each use, which quantized linears do not do; set it to 1."
        )
    if config.tp_comm_overlap:
        raise UserError(
            f"{name}: tp_comm_overlap=True is done by Transformer Engine's linears, in whose place "
            "quantized ones stand; these overlap the collectives of their backward passes unasked. Set "
            "it to False."
        )
    graphs = {"enable_cuda_graph": False, "external_cuda_graph": False, "cuda_graph_impl": "none"}
    for key, off in graphs.items():
        if getattr(config, key, off) != off:
            raise UserError(
                f"{name}: {key}={getattr(config, key)!r} would replay weights as quantized in the step "
                f"that was captured; set it to {off!r}."
            )


class QuantizedLinear(QuantizedModule):
    """What both linears add to Megatron's: the quantizers, the mode, and the quantized GEMM.

    Args:
        *args: As for the Megatron linear, and likewise what else is named there.
        quantized_name: Global name of this linear (`name` is Megatron's, since 0.18).
        scheme: What to quantize; None leaves the linear unquantized (but still calibratable).
        num_shards: Largest tensor-parallel size of the model (`layout.shard_count`).
        parts: 2 for a fused gate/up weight, otherwise 1.
        is_packed: The weight comes packed (`checkpoints/packed_backbone.py`); floats are never held.
        has_bias: Takes the place of `bias`, which Megatron's layers set from their config.
        **kwargs: As for the Megatron linear.

    Attributes:
        weight_quantizer: None when the scheme leaves weights alone; likewise
            `input_quantizer` and `output_quantizer`.
        gemm_kind: Fast path of the scheme; None: the weight is not quantized.
        step_weight: Where `quantized_step` keeps the weight; `weight_cache` inside of it.
        gradient_noise: Of gradients in 8 bits (`low_precision_backward.py`); None: they are exact.
        is_reference: Stay on the reference path, for comparisons.
        packed_weight: Present once the model has been lowered for inference.
        adapter: Low-rank, if `add_adapters_` gave it one (`lora.py`).

    Raises:
        UserError: A row-parallel linear is to add its bias itself: an output is quantized without it. Or
            the configuration asks for CUDA graphs, Transformer Engine's overlaps, or weights cut over
            ranks besides TP.
    """

    input_size: int
    local_shape: tuple[int, int]
    config: Any
    embedding_activation_buffer: Any
    weight_quantizer: Quantizer | None
    input_quantizer: Quantizer | None
    output_quantizer: Quantizer | None

    def __init__(
        self,
        *args: Any,
        quantized_name: str,
        scheme: LinearScheme | None,
        num_shards: int,
        parts: int = 1,
        is_packed: bool = False,
        has_bias: bool | None = None,
        **kwargs: Any,
    ) -> None:
        if has_bias is not None:
            kwargs["bias"] = has_bias
        super().__init__(*args, **kwargs)
        _check_config(quantized_name, self.config)
        is_row = isinstance(self, RowParallelLinear)
        if is_row and self.bias is not None and not self.skip_bias_add:
            raise UserError(
                f"{quantized_name}: a bias needs skip_bias_add=True here, as in all of Megatron's "
                "layers; the caller adds it."
            )
        self.quantized_name = quantized_name
        self.parts = parts
        self.shards_per_rank = num_shards // self.tp_group.size()
        self.overflow: Tensor | None = None
        self.gemm_kind: GemmKind | None = gemm_kind(scheme)
        self.step_weight = WeightCache()
        self.gradient_noise: GradientNoise | None = None
        self.is_reference = False
        self.scheme = scheme
        self.packed_weight: PackedWeight | None = None
        self.adapter: Adapter | None = None
        self.is_packed = is_packed
        operands = scheme.operands if scheme else {}
        for kind in _OPERANDS:
            quantizer = None
            if kind in operands and not (is_packed and kind == "weight"):
                shape = tuple(self.weight.shape) if kind == "weight" else None
                quantizer = Quantizer(operands[kind], shape, f"{quantized_name}.{kind}")
                is_cut_over_tp = kind == ("input" if is_row else "output")
                if is_cut_over_tp and isinstance(operands[kind].granularity, PerToken):
                    quantizer.reduce_amax = self._merge_maxima_
            setattr(self, f"{kind}_quantizer", quantizer)
        self.to(self.weight.device)
        if is_packed:
            free_weight_(self)

    def _merge_maxima_(self, local: Tensor) -> None:
        all_reduce_fused_([local], dist.ReduceOp.MAX, self.tp_group)

    @property
    def quantizers(self) -> dict[str, Quantizer]:
        """The quantizers that exist among `weight`, `input` and `output`."""
        found = {kind: getattr(self, f"{kind}_quantizer") for kind in _OPERANDS}
        return {kind: quantizer for kind, quantizer in found.items() if quantizer is not None}

    @property
    def weight_cache(self) -> WeightCache | None:
        """Present inside `quantized_step`."""
        return self.step_weight if self.step_weight.is_open else None

    def begin_calibration(self) -> None:
        """Switches to layout-exact, unquantized GEMMs and clears the overflow flag."""
        super().begin_calibration()
        self.overflow = torch.zeros((), dtype=torch.bool, device=self.weight.device)

    def end_calibration(self) -> None:
        """Back to the normal mode."""
        super().end_calibration()
        self.overflow = None

    def quantized_operands(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Both operands after their quantizers; bit-equal to what a server dequantizes."""
        if self.input_quantizer is not None:
            x = self.input_quantizer(x)
        is_fused = self.config.gradient_accumulation_fusion  # Megatron's kernel wants the parameter
        if self.gemm_kind is not None and torch.is_grad_enabled() and not is_fused:
            weight = accumulated_by_megatron(weight)
        if self.weight_quantizer is not None:
            weight = self.weight_quantizer(weight)
        return x, weight

    def quantized_output(self, output: Tensor) -> Tensor:
        """The output after its quantizer; summed over ranks already.

        With the bias where Megatron adds it in the linear (qkv), without where the caller adds it.
        """
        if self.is_calibrating:
            self.observe("output", output)
            return output
        return output if self.output_quantizer is None else self.output_quantizer(output)

    def packed_gemm(
        self,
        input: Tensor,
        *,
        bias: Tensor | None,
        sequence_parallel: bool,
        allreduce_dgrad: bool,
        **_: Any,
    ) -> Tensor:
        """With stored codes, behind Megatron's `_forward_impl`; the weight gets no gradient."""
        assert self.packed_weight is not None, "pack_weights_() has been called"
        wants_gradient = torch.is_grad_enabled() and input.requires_grad
        if sequence_parallel:
            input = gather_from_sequence_parallel_region(input, group=self.tp_group)
        elif allreduce_dgrad and wants_gradient:
            input = copy_to_tensor_model_parallel_region(input, group=self.tp_group)
        if wants_gradient:
            if self.input_quantizer is not None:
                input = self.input_quantizer(input)
            output = frozen_matmul(input, self.packed_weight)
        else:
            steps = None if self.input_quantizer is None else self.input_quantizer.qparams(input)
            output = packed_matmul(input, steps, self.packed_weight)
        return output if bias is None else output + bias

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """As torch's; a packed weight has entries of its own (`checkpoint.packed_sharded_state`)."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.is_packed:
            del destination[f"{prefix}weight"]

    def takes_gate_and_up(self, x: Tensor) -> bool:
        """Whether `x` is to be activated first (`ActivatedRowParallelLinear`)."""
        return False

    def _merges(self) -> bool:
        """Whether the adapter is part of the weight: if it is to be quantized with it, once that is."""
        quantizer = self.weight_quantizer
        return (
            self.adapter is not None
            and self.adapter.adapters.is_merged
            and quantizer is not None
            and quantizer.is_frozen
            and quantizer.is_enabled
        )

    def merged_weight(self) -> Tensor:
        """What the weight quantizer is given: `W`, or `W + s B A` where the adapter is part of it."""
        weight: Tensor = self.weight.detach()
        return weight if self.adapter is None or not self._merges() else self.adapter.merged(weight)

    def _is_fast(self) -> bool:
        """Whether codes of the scheme's format exist for all operands: quantization on, scales final."""
        return (
            self.gemm_kind is not None
            and not self.is_reference
            and all(
                q.is_frozen
                and q.is_enabled
                and q.observer is None
                and q.rule is None
                and q.active_format is None
                for q in self.quantizers.values()
            )
        )

    def quantized_gemm(
        self,
        input: Tensor,
        weight: Tensor,
        *,
        bias: Tensor | None,
        gradient_accumulation_fusion: bool,
        allreduce_dgrad: bool,
        sequence_parallel: bool,
        tp_group: Any,
        grad_output_buffer: Any = None,
        wgrad_deferral_limit: Any = None,
        gtp_remat_size: int = 1,
    ) -> Tensor:
        """The fast path behind Megatron's `_forward_impl`, whose arguments these are."""
        kind, quantizer = self.gemm_kind, self.weight_quantizer
        assert kind is not None and quantizer is not None, "_is_fast() holds"
        adapter = self.adapter if self._merges() else None
        cache = self.weight_cache if weight is self.weight else None
        if adapter is not None:  # which gets the gradient
            weight = adapter.carried_by(weight)
        used = (cache or WeightCache()).get(weight, quantizer, kind, adapter)
        keeps_graph, deferred = torch.is_grad_enabled(), None
        if grad_output_buffer is not None and self.embedding_activation_buffer[-1] is input:
            deferred = Deferred(self.embedding_activation_buffer, grad_output_buffer)
            if self.gradient_noise is not None and keeps_graph and weight.requires_grad:
                raise UserError(
                    f"{self.quantized_name}: backward=int8, fp8 and defer_embedding_wgrad_compute=True "
                    "exclude each other: Megatron multiplies a deferred weight gradient itself, not in "
                    "8 bits. Set defer_embedding_wgrad_compute to False, or backward to bf16."
                )
        scheme: TensorScheme | None = None
        steps: tuple[Tensor | None, Tensor | None] = (None, None)
        if self.input_quantizer is not None:
            scheme = self.input_quantizer.scheme
            if scheme.is_asymmetric and not encodes_input(scheme):
                scheme, input = None, self.input_quantizer(input)
            else:
                steps = self.input_quantizer.qparams(input)
        noise = self.gradient_noise
        gemm = Gemm(
            kind,
            scheme,
            allreduce_dgrad=allreduce_dgrad,
            sequence_parallel=sequence_parallel,
            tp_group=tp_group,
            keeps_graph=keeps_graph,
            scope=cache,
            rounding=noise.next_rounding() if noise is not None and keeps_graph else None,
            fuses=gradient_accumulation_fusion,
            deferred=deferred,
            activates=self.takes_gate_and_up(input),
        )
        output = quantized_matmul(input, weight, steps, used, gemm)
        return output if bias is None else output + bias

    def _check_fusion(self, deferred: Any) -> None:
        """Refuses Megatron's own sums of weight gradients where they would bypass a quantizer."""
        active = [kind for kind, q in self.quantizers.items() if q.is_frozen and q.is_enabled]
        fuses = self.config.gradient_accumulation_fusion and "weight" in active
        defers = deferred is not None and {"weight", "input"} & set(active)
        if torch.is_grad_enabled() and (fuses or defers):
            key = "gradient_accumulation_fusion" if fuses else "defer_embedding_wgrad_compute"
            raise UserError(
                f"{self.quantized_name}: {key}=True adds a gradient to main_grad that has not passed "
                "the quantizers, which here train a scale, have fewer bits for now, leave the weight "
                "alone, or are the reference to compare with. Set it to False."
            )

    def _calibration_gemm(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Unquantized and layout-exact."""
        raise NotImplementedError

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.is_calibrating:
            self.observe("input", input)
            if kwargs["sequence_parallel"]:
                input = gather_from_sequence_parallel_region(input, group=self.tp_group)
            return self._calibration_gemm(input, weight, kwargs.get("bias"))
        if self.packed_weight is not None:
            return self.packed_gemm(input, **kwargs)
        if self._is_fast():
            return self.quantized_gemm(input, weight, *args, **kwargs)
        self._check_fusion(kwargs.get("grad_output_buffer"))
        if self._merges():
            assert self.adapter is not None, "_merges()"
            weight = self.adapter.carried_by(self.adapter.merged(weight))
        operands = self.quantized_operands(input, weight)
        return super()._forward_impl(*operands, *args, **kwargs)  # type: ignore[misc]

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """As Megatron's, then the adapter, unless it is merged, and the output quantizer."""
        output, bias = super().forward(*args, **kwargs)
        if self.adapter is not None and not self._merges() and not self.is_calibrating:
            output = output + self.adapter(args[0])
        return self.quantized_output(output), bias


def free_weight_(linear: QuantizedLinear) -> None:
    """Gives the float weight's memory back; its shape stays known as `local_shape`."""
    weight: Any = linear.weight
    linear.local_shape = (weight.shape[0], weight.shape[1])
    weight.requires_grad_(False)
    weight.data = torch.empty(0, dtype=weight.dtype, device=weight.device)


class QuantColumnParallelLinear(QuantizedLinear, ColumnParallelLinear):  # type: ignore[misc]
    """`ColumnParallelLinear` with quantized operands."""

    def _calibration_gemm(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        output = sharded_linear(input, weight, self.shards_per_rank * self.parts)
        return output if bias is None else output + bias


class QuantRowParallelLinear(QuantizedLinear, RowParallelLinear):  # type: ignore[misc]
    """`RowParallelLinear` with quantized operands."""

    def _calibration_gemm(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        output, overflow = ordered_linear(input, weight, self.shards_per_rank, self.tp_group)
        assert self.overflow is not None, "begin_calibration() creates the flag"
        self.overflow |= overflow
        return output


def quantized_linears(model: Any) -> dict[str, QuantizedLinear]:
    """Linears of this rank by global name, for a model or a list of pipeline chunks."""
    modules = quantized_modules(model)
    return {name: m for name, m in modules.items() if isinstance(m, QuantizedLinear)}


def decoder_linears(model: Any) -> dict[str, QuantizedLinear]:
    """Those of the layers: without the output layer."""
    return {n: x for n, x in quantized_linears(model).items() if is_in_layer(n)}


def tp_axis(module: QuantizedModule, kind: str, part: str) -> int | None:
    """Dimension of a frozen tensor that is cut over TP; None when every rank holds the same one.

    A weight's maxima are then those of all ranks (tables in `checkpoint.py` and `reduce.py`).
    """
    if kind != "weight" or part == "global_scale":
        return None
    granularity = module.quantizers[kind].scheme.granularity
    if isinstance(granularity, PerTensor):
        return None
    if not isinstance(module, QuantRowParallelLinear):
        return 0
    return 1 if isinstance(granularity, PerGroup | PerBlock) else None

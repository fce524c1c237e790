"""The modelled step against arithmetic by hand, and as `mqat plan` prints it."""

import re
import sys
from dataclasses import replace

import pytest

from mqat.cli.__main__ import main
from mqat.plan import step_model
from mqat.plan.step_model import H100, Kernel, estimate, linear_kernels
from mqat.quant.algorithm import named_scheme
from mqat.quant.formats import FORMATS
from mqat.quant.granularity import PerBlock, PerChannel, PerGroup, PerTensor, PerToken
from mqat.quant.scheme import LinearScheme, TensorScheme

TOKENS, SIZE, MICROBATCHES = 8192, 4096, 8
# A Llama layer of that hidden size: out and in features.
LAYER = ((6144, SIZE), (SIZE, SIZE), (22528, SIZE), (SIZE, 11264))


def modelled(algorithm, shapes=LAYER, card=H100, **options):
    pairs = [
        (
            linear_kernels(named_scheme(algorithm), TOKENS, *shape, is_activated=last, **options),
            linear_kernels(None, TOKENS, *shape, is_activated=last),
        )
        for shape in shapes
        for last in (shape == LAYER[-1],)
    ]
    return estimate(pairs, MICROBATCHES, card)


def test_a_kernel_takes_the_longest_of_launch_traffic_and_arithmetic():
    card = replace(H100, bytes_per_second=1e12, bf16_flops=1e15, eight_bit_flops=2e15)
    assert Kernel(0).seconds(card) == card.launch_seconds
    assert Kernel(1e9).seconds(card) == 1e-3
    assert Kernel(1e9, 4e12).seconds(card) == 4e-3
    assert Kernel(1e9, 4e12, is_eight_bit=True).seconds(card) == 2e-3


def test_a_bf16_linear_is_three_gemms_and_the_sum_of_its_gradient():
    found = linear_kernels(None, TOKENS, SIZE, SIZE)
    gemms = 3 * 2 * TOKENS * SIZE * SIZE / H100.bf16_flops
    assert gemms == pytest.approx(1.27e-3, rel=1e-2)
    added = 10 * SIZE * SIZE / H100.bytes_per_second
    assert found.step_seconds(1, H100) == pytest.approx(gemms + added, rel=1e-6)


def test_an_int8_linears_passes_by_hand():
    w, x = SIZE * SIZE, TOKENS * SIZE
    found = linear_kernels(named_scheme("int8"), TOKENS, SIZE, SIZE)
    assert [k.num_bytes for k in found.once] == [3.125 * w, 8.125 * w]
    beside = [k.num_bytes for k in (*found.forward, *found.backward) if not k.flops]
    assert sorted(beside) == sorted([3.125 * x, 0, 3 * w, 3 * x, 10 * w, 4.125 * x])


def test_swiglu_is_counted_once_where_it_encodes_and_beside_the_linear_where_it_does_not():
    x = TOKENS * SIZE

    def bytes_of(algorithm, part):
        scheme = named_scheme(algorithm)
        both = linear_kernels(scheme, TOKENS, SIZE, SIZE, is_activated=True)
        alone = linear_kernels(scheme, TOKENS, SIZE, SIZE)
        return beside(getattr(both, part))[1] - beside(getattr(alone, part))[1]

    # Reads gate and up, and the gradient; writes values, and gradients of both.
    assert (bytes_of("null", "forward"), bytes_of("null", "backward")) == (6 * x, 10 * x)
    assert bytes_of("int8_pc_pt", "forward") == 6 * x
    assert (bytes_of("int8", "forward"), bytes_of("int8", "backward")) == (2 * x, 6 * x)
    assert modelled("null").ratio == 1


@pytest.mark.parametrize("algorithm", ["int8", "fp8"])
def test_int8_and_fp8_steps_are_below_bf16_on_a_llama_layer(algorithm):
    exact = modelled(algorithm)
    assert exact.ratio <= 0.95
    assert exact.forward < 1 < exact.backward
    slow = replace(H100, bytes_per_second=H100.bytes_per_second / 4)
    assert modelled(algorithm, card=slow).ratio > 1  # control: the passes do count


@pytest.mark.parametrize("algorithm", ["int8", "fp8"])
def test_gradients_in_8_bits_pay_where_one_kernel_rounds_them(algorithm, monkeypatch):
    assert modelled(algorithm, backward=algorithm).ratio <= 0.85
    # Control: torch, operation by operation, moves 323 bytes an element and more.
    monkeypatch.setattr(step_model, "_ENCODE", 323.0)
    assert modelled(algorithm, backward=algorithm).ratio > 2


def test_unquantized_is_one_and_weight_only_adds_the_weight():
    assert modelled("null").ratio == 1
    int4 = modelled("int4")
    assert int4.forward == 1 and 0 < int4.once < 0.01 and int4.ratio > 1


def scheme(fmt, granularity, **flags):
    return TensorScheme(FORMATS[fmt], granularity, **flags)


def beside(kernels):
    """Launches beside the GEMMs, and their bytes."""
    found = [kernel.num_bytes for kernel in kernels if not kernel.flops]
    return len(found), sum(found)


DYNAMIC = {"is_dynamic": True}
SHIFTED = {"is_asymmetric": True}


# Bytes an element and launches, forward and backward beyond the 10 bytes of the weight's gradient, as
# traced with fake CUDA tensors (`Ledger` of tests/unit/fake_cuda.py).
@pytest.mark.parametrize(
    ("operand", "forward", "backward"),
    [
        (scheme("int8", PerGroup(64), **DYNAMIC), (6.84, 9), (0, 0)),
        (scheme("int8", PerGroup(128), **DYNAMIC), (6.48, 9), (0, 0)),
        (scheme("int8", PerGroup(64), **DYNAMIC, **SHIFTED), (58.84, 30), (0, 0)),
        (scheme("uint8", PerTensor(), **SHIFTED), (77.0, 16), (5, 1)),
        (scheme("int8", PerTensor(), **SHIFTED), (77.0, 16), (5, 1)),
        (scheme("int6", PerTensor()), (4.13, 1), (4.13, 1)),
        (scheme("int4", PerToken(), **DYNAMIC), (6.14, 10), (0, 0)),
        (scheme("uint4", PerToken(), **DYNAMIC, **SHIFTED), (56.04, 30), (0, 0)),
        (scheme("nf4", PerToken(), **DYNAMIC), (104.14, 32), (0, 0)),
    ],
    ids=lambda value: str(value) if isinstance(value, tuple) else value.format.name,
)
def test_inputs_that_no_kernel_of_their_own_quantizes_cost_what_was_traced(
    operand, forward, backward
):
    own = LinearScheme("own", named_scheme("int8").weight, operand)
    x = TOKENS * SIZE
    found = linear_kernels(own, TOKENS, SIZE, SIZE)
    for kernels, (num_bytes, launches), other, others in (
        (found.forward, forward, 0, 0),
        (found.backward, backward, 10 * SIZE * SIZE, 1),
    ):
        count, total = beside(kernels)
        assert count == launches + others
        assert (total - other) / x == pytest.approx(num_bytes, rel=0.01)


@pytest.mark.parametrize(
    ("weight", "num_bytes", "launches"),
    [
        (scheme("uint8", PerChannel(), **SHIFTED), 96.1, 23),
        (scheme("int8", PerChannel(), **SHIFTED), 96.1, 23),
        (scheme("uint4", PerGroup(128), **SHIFTED), 96.7, 23),
        (scheme("nf4", PerGroup(64)), 102.3, 23),
        (scheme("int2_elastic", PerChannel()), 102.1, 23),
        (scheme("int8", PerBlock(128)), 84.1, 14),
        (scheme("int6", PerChannel()), 4.125, 1),
    ],
    ids=lambda value: value.format.name if isinstance(value, TensorScheme) else str(value),
)
def test_so_do_weights_once_per_step(weight, num_bytes, launches):
    found = linear_kernels(LinearScheme("own", weight, None), TOKENS, SIZE, SIZE)
    count, total = beside(found.once)
    assert count == launches + 1  # the mask of main_grad
    assert total / SIZE**2 - 8.125 == pytest.approx(num_bytes, rel=0.01)


@pytest.mark.parametrize("size", [4, 12, 16, 32, 64, 256])
@pytest.mark.parametrize("flags", [DYNAMIC, DYNAMIC | SHIFTED])
def test_blocks_of_any_size_are_modelled_and_never_free(size, flags):
    own = LinearScheme("own", named_scheme("int8").weight, scheme("int8", PerGroup(size), **flags))
    plain = linear_kernels(None, TOKENS, SIZE, SIZE)
    found = linear_kernels(own, TOKENS, SIZE, SIZE)
    assert beside(found.forward)[1] > 6 * TOKENS * SIZE
    assert estimate([(found, plain)], MICROBATCHES, H100).ratio > 1


CONFIG = """
model:
  architecture: {hidden_size: 4096, intermediate_size: 11008, num_layers: 2, num_attention_heads: 32,
                 num_query_groups: 32, max_position_embeddings: 8192}
  tensor_model_parallel_size: 2
  sequence_parallel: true
  global_batch_size: 16
  data: {packaged: python_docs, seq_length: 8192}
quantization: {algorithm: int8}
export: {format: null}
exp_manager: {exp_dir: runs/none}
"""


def test_plan_prints_it_for_the_layout_and_says_that_it_is_not_measured(
    tmp_path, monkeypatch, capsys
):
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG)
    command = [
        "mqat",
        "plan",
        "--config",
        str(path),
        "--world-size",
        "4",
        "model.micro_batch_size=1",
    ]
    ratios = []
    for algorithm in ("int8", "null"):
        monkeypatch.setattr(sys, "argv", [*command, f"quantization.algorithm={algorithm}"])
        main()
        found = re.search(
            r"^modelled step on H100: ([0-9.]+) of BF16 \(linears: forward [0-9.]+, backward [0-9.]+; "
            r"weight quantization [0-9.]+ of a step; linears 78% of a BF16 step, as at hidden 4096; "
            r"8192 tokens x 8 microbatches\), not measured$",
            capsys.readouterr().out,
            re.MULTILINE,
        )
        ratios.append(None if found is None else float(found[1]))
    assert ratios[0] is not None and 0.8 < ratios[0] < 1.0 and ratios[1] is None


def test_plan_models_blocks_of_inputs_of_another_size(tmp_path, monkeypatch, capsys):
    rule = (
        "quantization: {algorithm: int8, rules: [{pattern: '*', "
        "input: {format: int8, granularity: 'group:64', dynamic: true}}]}"
    )
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG.replace("quantization: {algorithm: int8}", rule))
    arguments = ["--config", str(path), "--world-size", "4", "model.micro_batch_size=1"]
    monkeypatch.setattr(sys, "argv", ["mqat", "plan", *arguments])
    main()
    assert "modelled step on H100: 1." in capsys.readouterr().out

"""The quality report of a mixture: every expert's figures, each layer's worst, those without tokens."""

import json
import math

import pytest
import torch

from mqat.report.page import html_page, shown, write_report
from tests.distributed.worker import EXPERTS
from tests.unit.model_fixtures import epoch, microbatches, padded_data, without_masks
from tests.unit.parallel.test_experts import IDLE, calibrated


@pytest.fixture
def report(world):
    """`report(algorithm, steps, idle=...)`: (chunks, the report) of a tiny mixture."""
    from megatron.core import parallel_state

    from mqat.evaluation.forward import run_layers
    from mqat.evaluation.quality import quality_report

    def make(algorithm, *epochs, idle=True):
        chunks, _ = calibrated(algorithm, idle=idle)
        group = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
        found = [
            quality_report(chunks, lambda steps=steps: run_layers(chunks, steps), group=group)
            for steps in epochs or [[microbatches()]]
        ]
        return chunks, found if epochs else found[0]

    return make


def test_figures_of_an_expert_are_those_of_its_own_tokens(report):
    from mqat.evaluation.forward import run_layers
    from mqat.evaluation.sqnr_hooks import _unquantized
    from mqat.parallel.linear import quantized_linears

    chunks, found = report("int8", idle=False)
    entries = {entry["name"]: entry for entry in found["linears"]}
    assert list(entries) == list(quantized_linears(chunks))
    for name in (
        "decoder.layers.0.mlp.experts.1.linear_fc1",
        "decoder.layers.1.mlp.experts.2.linear_fc2",
    ):
        linear, given = quantized_linears(chunks)[name], []
        hook = linear.register_forward_pre_hook(lambda _, args, given=given: given.append(args[0]))
        run_layers(chunks, [microbatches()])
        hook.remove()
        x = torch.cat([rows.detach().flatten(0, -2) for rows in given])[:, None]
        with torch.no_grad():
            quantized = linear(x)[0].double()
            with _unquantized(linear):
                exact = linear(x)[0].double()
        expected = 10 * math.log10(exact.square().sum() / (quantized - exact).square().sum())
        assert entries[name]["output_sqnr_db"] == pytest.approx(expected, rel=1e-5)
        assert entries[name]["input_amax"] == pytest.approx(float(x.abs().max()), rel=1e-6)


def test_a_layers_worst_expert_is_named_and_idle_ones_are_listed(report, tmp_path):
    _, found = report("int8")
    assert [(m["layer"], m["module"]) for m in found["mixtures"]] == [
        (layer, f"linear_fc{n}") for layer in range(EXPERTS.num_layers) for n in (1, 2)
    ]
    for mixture in found["mixtures"]:
        own = {
            entry["name"]: entry["output_sqnr_db"]
            for entry in found["linears"]
            if entry["layer"] == mixture["layer"]
            and entry["module"].endswith(mixture["module"])
            and not entry.get("is_idle", True)
        }
        assert mixture["experts"] == 4 and mixture["idle"] == ([3] if mixture["layer"] == 0 else [])
        assert len(own) == 4 - len(mixture["idle"])
        assert mixture["worst"] == min(own, key=own.__getitem__)
        assert mixture["output_sqnr_db"]["worst"] == min(own.values())
        assert mixture["output_sqnr_db"]["median"] == sorted(own.values())[len(own) // 2]
    idle = [entry["name"] for entry in found["linears"] if entry.get("is_idle")]
    assert idle == [f"{IDLE}{n}" for n in (1, 2)]
    names = {entry["name"] for entry in shown(found)}
    assert {m["worst"] for m in found["mixtures"]} < names and not names & set(idle)
    assert len(names) == 2 * (2 + 2)  # of each layer: attention, and two of an expert
    page = html_page(found, "experts")
    assert "<h2>Experts</h2>" in page and found["mixtures"][0]["worst"] in page
    write_report(found, tmp_path, "experts")
    assert json.loads((tmp_path / "quality.json").read_text()) == found


def test_padding_is_in_no_figure_of_an_expert(report):
    first, second = padded_data(20), padded_data(300)
    plain = epoch(first)
    _, found = report("int8_pc_pt", plain, epoch(second), without_masks(plain), idle=False)
    one, other, ignored = (
        torch.tensor([e["output_sqnr_db"] for e in r["linears"] if not e.get("is_idle")])
        for r in found
    )
    # Padding changes the shapes of GEMMs, whose sums round in another order.
    assert float((one - other).abs().max()) < 1e-2
    assert len(one) != len(ignored) or float((one - ignored).abs().max()) > 0.1  # control

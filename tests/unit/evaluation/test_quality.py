"""The quality report of one process: hand-checked numbers, and the page."""

import itertools
import json
import math
from dataclasses import replace

import pytest
import torch

from mqat.checkpoints.random_weights import RandomWeights
from mqat.models.adapters import Adapters
from mqat.models.structure import is_in_layer
from mqat.quant.algorithm import named_scheme
from mqat.quant.granularity import PerTensor
from mqat.quant.quantizer import Quantizer
from mqat.quant.scheme import TensorScheme
from mqat.report.advice import hint
from mqat.report.page import html_page, worst_first, write_report
from mqat.specs.policy import Policy, Rule
from tests.unit.model_fixtures import MODEL, epoch, microbatches, padded_data, without_masks
from tests.unit.report import entries as made_up


@pytest.fixture
def calibrated(world):
    """`calibrated("int8")`: a tiny model and its report; `change` alters weights before calibration."""

    def make(algorithm, change=None, **policy):
        from megatron.core import parallel_state

        from mqat.calibration.calibrate import calibrate
        from mqat.checkpoints.pretrained import load_pretrained_
        from mqat.config import ModelConfig
        from mqat.evaluation.forward import run_layers
        from mqat.evaluation.quality import quality_report
        from mqat.parallel.linear import quantized_linears
        from mqat.specs.model import build_model

        layers = Policy(algorithm, 32, **policy).schemes(MODEL)
        chunks = build_model(MODEL, ModelConfig(), layers, torch.float32)
        load_pretrained_(chunks, RandomWeights(MODEL, 1, 0.1))
        linears = quantized_linears(chunks)
        if change is not None:
            change(linears)
        group = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)

        def run(steps):
            run_layers(chunks, steps)

        if layers:
            calibrate(chunks, lambda: run([microbatches()]), group=group)

        def report(steps=None):
            return quality_report(chunks, lambda: run(steps or [microbatches()]), group=group)

        report.chunks = chunks
        return linears, report

    return make


def by_name(report):
    return {entry["name"]: entry for entry in report["linears"]}


def test_weight_figures_are_those_of_the_definition(calibrated):
    linears, report = calibrated("int8")
    found = by_name(report())
    assert list(found) == list(linears)
    for name, linear in linears.items():
        weight, entry = linear.weight.detach().double(), found[name]["weight"]
        error = linear.weight_quantizer(linear.weight.detach()).double() - weight
        expected = 10 * math.log10(weight.square().sum() / error.square().sum())
        assert entry["sqnr_db"] == pytest.approx(expected, rel=1e-9)
        assert entry["amax"] == float(linear.weight.abs().max()) and entry["clip_rate"] == 0
        steps = linear.weight_quantizer.scale
        assert entry["scale"] == [float(steps.min()), float(steps.max())]
        assert entry["format"] == "int8 per channel"
        assert 20 < found[name]["output_sqnr_db"] < 60


def test_weight_figures_are_of_what_is_quantized_where_an_adapter_is_merged(calibrated):
    from mqat.parallel.add_adapters import add_adapters_

    linears, report = calibrated("int8")
    names = [name for name in linears if is_in_layer(name)]
    found = {}
    for is_merged in (False, True):
        add_adapters_(report.chunks, Adapters(tuple(names), 4, 8.0, is_merged=is_merged))
        for name in names:
            linears[name].adapter.linear_out.data.fill_(0.05)
        found[is_merged] = by_name(report())
    for name in names:
        linear = linears[name]
        for is_merged, weight in (
            (False, linear.weight.detach()), (True, linear.adapter.merged(linear.weight)),
        ):  # fmt: skip
            entry = found[is_merged][name]["weight"]
            error = linear.weight_quantizer(weight).double() - weight.double()
            expected = 10 * math.log10(weight.double().square().sum() / error.square().sum())
            assert entry["sqnr_db"] == pytest.approx(expected, rel=1e-9)
            assert entry["amax"] == float(weight.abs().max())
    control = [found[True][n]["weight"]["amax"] != found[False][n]["weight"]["amax"] for n in names]
    assert all(control)


def test_more_bits_are_six_decibels_each_and_quantizers_are_back_on(calibrated):
    mean = {}
    for algorithm in ("int8_wo", "int4"):
        linears, report = calibrated(algorithm)
        mean[algorithm] = sum(e["output_sqnr_db"] for e in report()["linears"]) / len(linears)
        assert all(x.weight_quantizer.is_enabled for x in linears.values())
        assert not any(x._forward_hooks for x in linears.values())
        assert all(e["input"] is None for e in report()["linears"])
    # Groups of 32 win back some of the four bits.
    assert 12 < mean["int8_wo"] - mean["int4"] < 28


def test_an_outlier_channel_is_counted_and_named(calibrated):
    name = "decoder.layers.1.mlp.linear_fc2"

    def grow(linears):
        up = MODEL.intermediate_size  # the first row of the second half
        linears["decoder.layers.1.mlp.linear_fc1"].weight.data[up + 7] *= 300

    _, report = calibrated("int8", grow)
    found = by_name(report())
    assert found[name]["outliers"]["count"] >= 1
    assert found[name]["outliers"]["worst"][0][0] == 7
    _, plain = calibrated("int8")
    control = by_name(plain())[name]
    assert control["outliers"] == {"count": 0, "worst": []}
    assert found[name]["output_sqnr_db"] < control["output_sqnr_db"] - 1


def test_clipping_is_counted():
    from mqat.evaluation.sqnr_hooks import clipped

    quantizer = Quantizer(TensorScheme(named_scheme("int8").input.format, PerTensor()), None, "x")
    quantizer.load_({"scale": torch.tensor([0.5])})
    x = torch.tensor([63.5, 63.7, 63.8, -64.2, -64.3, 0.0])  # codes -128..127, half a step of slack
    assert int(clipped(x, quantizer)) == 2
    assert int(clipped(x, Quantizer(named_scheme("8da4w").input, None, "x"))) == 0


OUTPUT = Rule("*.linear_fc2", operands={"output": {"format": "int8_full", "granularity": "tensor"}})


def test_outputs_are_reported(calibrated):
    linears, report = calibrated("null", rules=(OUTPUT,))
    entries = report()["linears"]
    assert [e["name"] for e in entries] == [n for n, x in linears.items() if x.output_quantizer]
    for entry in entries:
        assert entry["weight"] is None and entry["input"] is None
        # The output alone is quantized: its noise is all there is.
        assert (
            entry["output"]["sqnr_db"] == entry["output_sqnr_db"]
            and 25 < entry["output_sqnr_db"] < 60
        )
        assert entry["output"]["clip_rate"] < 1e-3
        # Later layers see other inputs than in calibration.
        assert entry["output"]["scale"][0] == pytest.approx(entry["output"]["amax"] / 127, rel=2e-2)


@pytest.mark.parametrize(("scales", "kinds"), [("shared", ["kv"]), ("separate", ["key", "value"])])
def test_caches_are_reported(calibrated, scales, kinds):
    _, report = calibrated("null", kv_cache="int8", kv_cache_scales=scales)
    found = report()
    assert found["linears"] == [] and len(found["caches"]) == MODEL.num_layers
    for entry in found["caches"]:
        assert [key for key in entry if key in ("kv", "key", "value")] == kinds
        assert 20 < entry["output_sqnr_db"] < 70
        for kind in kinds:
            assert (
                entry[kind]["format"] == "int8_full per tensor" and 20 < entry[kind]["sqnr_db"] < 60
            )
            assert entry[kind]["scale"][0] == pytest.approx(entry[kind]["amax"] / 127, rel=2e-2)


# Static, dynamic per token with and without zero points, groups, outputs; with caches.
@pytest.mark.parametrize("algorithm", ["int8", "int8_pc_pt", "8da4w", "nvfp4"])
def test_padding_and_filler_are_in_no_figure(calibrated, algorithm):
    _, report = calibrated(algorithm, kv_cache="int8", rules=(OUTPUT,))
    first, second = padded_data(20), padded_data(300)
    found = report(epoch(first))
    assert len(found["linears"]) == 4 * MODEL.num_layers and found["caches"]
    assert report(epoch(second)) == found
    assert report(epoch(first, global_batch_size=16)) == found
    ignored = [
        report(without_masks(epoch(first))),
        report(without_masks(epoch(second))),
        report(without_masks(epoch(first, global_batch_size=16))),
    ]
    assert all(a != b for a, b in itertools.combinations([found, *ignored], 2))


def test_rows_alone_and_padded_have_the_same_figures(calibrated):
    _, report = calibrated("int8", kv_cache="int8")
    data = padded_data(20)
    alone = replace(
        data,
        tokens=data.tokens[:, :17],
        loss_mask=data.loss_mask[:, :16],
        segments=data.segments[:, :16],
    )
    assert report(epoch(data)) == report(epoch(alone))
    assert report(without_masks(epoch(data))) != report(epoch(alone))


def test_filler_alone_is_an_error(calibrated):
    _, report = calibrated("int8_pc_pt")
    (step,) = epoch(padded_data(20, rows=2))
    with pytest.raises(ValueError, match=r"no token reached decoder\.layers\.0"):
        report([step[1:]])


def test_what_is_not_finite_is_an_error_and_not_exact(calibrated):
    linears, report = calibrated("int8")
    name = "decoder.layers.1.mlp.linear_fc2"
    linears[name].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=f"{name} is NaN or infinite"):
        report()


def test_nothing_quantized_is_an_error(calibrated):
    _, report = calibrated("null")
    with pytest.raises(ValueError, match="nothing of this model is quantized"):
        report()


def test_noise_as_loud_as_the_signal_is_not_exact():
    exact, loud = made_up.entry("a", None), made_up.entry("b", 0.0, weight=0.0)
    assert worst_first([exact, loud]) == [loud, exact]
    assert "weight is the cause" in hint(loud)
    assert "weight is the cause" not in hint(made_up.entry("b", 0.0, weight=None))


def test_the_page_shows_the_worst_first_and_is_whole_or_absent(tmp_path, monkeypatch):
    linears = [made_up.entry("decoder.layers.0.mlp.linear_fc1", 35.0),
               made_up.entry("decoder.layers.1.mlp.linear_fc2", 9.0, outliers=1)]  # fmt: skip
    cache = {
        "name": "decoder.layers.0.core_attention",
        "output_sqnr_db": 30.0,
        "kv": {"format": "int8", "amax": 2.0, "clip_rate": 0.25, "scale": [1, 1], "sqnr_db": 31.0},
    }
    report = {"version": 1, "linears": linears, "mixtures": [], "caches": [cache]}
    assert worst_first(linears)[0] is linears[1]
    page = html_page(report, "a <b>")
    assert "a &lt;b&gt;" in page and "<svg" in page and "<?xml" not in page
    assert page.index("layers.1.mlp.linear_fc2</span>") < page.index(
        "layers.0.mlp.linear_fc1</span>"
    )
    assert "core_attention.kv</td><td>30.0</td><td>31.0</td><td>25%</td><td>2</td>" in page
    assert "Key/value cache" not in html_page(report | {"caches": []}, "a")
    assert "<svg" not in html_page(report | {"linears": []}, "a")
    assert "3 (12.5x)" in page and "1 with less than 20 dB" in page
    write_report(report, tmp_path / "q", "t")
    assert json.loads((tmp_path / "q" / "quality.json").read_text()) == report
    assert sorted(f.name for f in (tmp_path / "q").iterdir()) == ["quality.html", "quality.json"]
    monkeypatch.setattr("mqat.report.plots.find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"pip install 'mqat\[report\]'"):
        write_report(report, tmp_path / "none", "t")
    assert not (tmp_path / "none").exists()

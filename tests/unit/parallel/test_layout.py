import pytest

from mqat.models.decoder import DecoderConfig
from mqat.parallel.layout import check_group_sizes
from mqat.quant.algorithm import named_scheme
from mqat.quant.formats import FP8_E4M3
from mqat.quant.granularity import PerBlock
from mqat.quant.scheme import LinearScheme, TensorScheme

MODEL = DecoderConfig(
    vocab_size=301, hidden_size=256, intermediate_size=512, num_layers=1,
    num_attention_heads=4, num_query_groups=2, head_dim=64, tie_word_embeddings=True,
)  # fmt: skip
QKV, PROJ, FC1, FC2 = (
    f"decoder.layers.0.{name}"
    for name in (
        "self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2",
    )
)  # fmt: skip
SQUARES = LinearScheme("custom", TensorScheme(FP8_E4M3, PerBlock(128)), None)


def check(name: str, scheme: LinearScheme, tp: int) -> None:
    check_group_sizes(MODEL, {name: scheme}, tp=tp, purpose="tensor_model_parallel_size")


@pytest.mark.parametrize(("name", "tp"), [(FC1, 1), (FC1, 4), (FC2, 4), (PROJ, 2)])
def test_squares_that_stay_on_a_rank_are_accepted(name, tp):
    check(name, SQUARES, tp)


@pytest.mark.parametrize(
    ("name", "tp", "message"),
    [
        (
            FC2,
            8,
            r"linear_fc2\.weight: group_size=128 does not divide in_features_per_partition=64",
        ),
        (FC1, 8, r"linear_fc1\.weight: squares of 128 rows do not divide the 64 rows of part 0"),
        (QKV, 1, r"the 64 rows of part 1 .*nor the parts of a fused weight; choose"),
    ],
)
def test_squares_that_cross_ranks_or_fused_parts_are_refused(name, tp, message):
    with pytest.raises(ValueError, match=message):
        check(name, SQUARES, tp)


@pytest.mark.parametrize(("algorithm", "fits"), [("nvfp4", 32), ("mxfp8", 16)])
def test_blocks_of_row_parallel_weights_and_inputs_stay_on_a_rank(algorithm, fits):
    scheme = named_scheme(algorithm)
    check(FC2, scheme, fits)
    for part in (scheme, LinearScheme("custom", None, scheme.input)):
        with pytest.raises(ValueError, match="does not divide in_features_per_partition"):
            check(FC2, part, 2 * fits)
    check(QKV, scheme, 2)  # column-parallel inputs are whole


def test_tokens_may_be_cut_over_ranks():
    check(FC2, named_scheme("fp8_pc_pt"), 8)

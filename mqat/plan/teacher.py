"""What can be said of a teacher before any process group exists."""

from pathlib import Path

from mqat.checkpoints.manifest import DESCRIPTION, read_description
from mqat.config import RunConfig
from mqat.data.tokenizer import load_tokenizer
from mqat.errors import UserError
from mqat.models.decoder import DecoderConfig
from mqat.parallel.layout import check_parallel_sizes
from mqat.plan.attention import check_attention
from mqat.plan.origin import Opener, Origin, open_origin

_KEY = "quantization.distill"
_MERGING = "mqat export --format peft, then mqat import of that with --base"


def read_teacher(
    config: RunConfig, model: DecoderConfig, source: Origin, opener: Opener | None = None
) -> tuple[DecoderConfig, Origin] | None:
    """Another model to learn from; None: there is no teacher, or it is the student's own start.

    Args:
        config: Of the run.
        model: Sizes of the student.
        source: Where the student starts.
        opener: As of `make_plan`.

    Raises:
        UserError: It cannot teach this model, or not on this layout.
    """
    quantization = config.quantization
    distill = quantization.distill
    if distill is None:
        return None
    if distill.top_k is not None and distill.top_k > model.vocab_size:
        raise UserError(
            f"config: {_KEY}.top_k={distill.top_k} exceeds the vocabulary's {model.vocab_size} tokens."
        )
    if distill.teacher is None:
        steps = quantization.fake_quant_after_n_steps
        if steps and distill.weight == 1:
            raise UserError(
                f"config: quantization.fake_quant_after_n_steps={steps}: until then student and teacher "
                "are the same function, and there is nothing to learn. Set it to 0, "
                f"{_KEY}.weight below 1, or name another {_KEY}.teacher."
            )
        if isinstance(source, Path) and _has_adapters(source):
            raise UserError(
                f"config: {_KEY}.teacher=null, but model.restore_from_path={source} has adapters, "
                "without which its weights are another model; put them into the weights "
                f"({_MERGING}), or name the teacher."
            )
        return None
    path, named = Path(distill.teacher), f"config: {_KEY}.teacher={distill.teacher}"
    if not distill.teacher or (opener is None and not path.exists()):
        raise UserError(
            f"{named}: no such file or directory; name a Hugging Face directory, a .gguf file or an "
            "mqat checkpoint, or null for the weights that QAT starts from."
        )
    try:
        teacher, origin = (opener or open_origin)(path, f"{_KEY}.teacher")
    except ValueError as error:
        raise UserError(f"{named}: {error}") from error
    described = read_description(path) if (path / DESCRIPTION).exists() else None
    if described is not None and described["quantization"] is not None:
        raise UserError(
            f"{named}: holds a quantized model, whose weights without its quantizers are nobody's. Use "
            "the unquantized checkpoint that it was made from."
        )
    if _has_adapters(path):
        raise UserError(
            f"{named}: has adapters, without which its weights are another model; put them into the "
            f"weights ({_MERGING})."
        )
    _check_shapes(config, model, teacher, named)
    return teacher, origin


def _has_adapters(path: Path) -> bool:
    """Whether it is an mqat checkpoint that holds some."""
    if not (path / DESCRIPTION).exists():
        return False
    return read_description(path).get("adapters") is not None


def _check_shapes(
    config: RunConfig, model: DecoderConfig, teacher: DecoderConfig, named: str
) -> None:
    settings, distill = config.model, config.quantization.distill
    assert distill is not None, "the caller has one"
    if teacher.vocab_size != model.vocab_size:
        raise UserError(
            f"{named}: its vocabulary tables have {teacher.vocab_size} rows, the student's "
            f"{model.vocab_size}; both must have as many, one for each token that is compared. Use a "
            "teacher with the same tables."
        )
    if distill.hidden_weight and teacher.hidden_size != model.hidden_size:
        raise UserError(
            f"config: {_KEY}.hidden_weight={distill.hidden_weight}: the teacher's hidden states have "
            f"{teacher.hidden_size} channels, the student's {model.hidden_size}; set it to 0."
        )
    if settings.data.seq_length > teacher.max_position_embeddings:
        raise UserError(
            f"{named}: model.data.seq_length={settings.data.seq_length} exceeds its "
            f"max_position_embeddings={teacher.max_position_embeddings}; use shorter sequences."
        )
    try:
        check_attention(settings, teacher)
        check_parallel_sizes(
            teacher,
            tp=settings.tensor_model_parallel_size,
            pp=settings.pipeline_model_parallel_size,
            virtual_pp=settings.virtual_pipeline_model_parallel_size or 1,
            ep=settings.expert_model_parallel_size if teacher.num_experts else 1,
        )
    except ValueError as error:
        raise UserError(f"{named}: {error}") from error


def check_same_tokens(teacher: Origin, ours: dict[str, int]) -> None:
    """Refuses a teacher whose tokens have other numbers than the student's, though they are as many.

    `ours`: the student's tokens and their numbers.
    """
    source = teacher / "tokenizer" if isinstance(teacher, Path) else teacher.tokenizer_source
    assert source is not None, "a teacher is in files"
    theirs = load_tokenizer(source).get_vocab()
    other = sorted(t for t in theirs.keys() | ours.keys() if theirs.get(t) != ours.get(t))
    if other:
        raise UserError(
            f"config: {_KEY}.teacher: the tokenizer in {source} gives {len(other)} tokens other numbers "
            f"than the student's, such as {other[0]!r} ({theirs.get(other[0])}, not "
            f"{ours.get(other[0])}). Use a teacher with the same tokenizer."
        )

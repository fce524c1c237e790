"""A fast tokenizer out of SentencePiece's pieces, whether a `.model` file or GGUF metadata list them.

SentencePiece puts its dummy blank before every text, also before one that begins with a blank;
llama.cpp and transformers' legacy Llama classes put it after every special token, too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mqat.errors import UserError

BLANK = "\u2581"
# Kinds of pieces: sentencepiece_model.proto (`SentencePiece.Type`); GGUF numbers them alike.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_PROBES = (
    "The wall was built in 1871; the 2nd costs $3.50!",
    "  two  blanks,\ta tab\n\nand line ends \n",
    " Où est-ce ? 日本語 🙂 Ωμέγα é ﬁ ½",
    "",
)


@dataclass(frozen=True)
class Pieces:
    """A SentencePiece vocabulary and how text is normalized before it.

    Attributes:
        names: Piece of each id, unique.
        scores: Of each piece; higher is merged earlier.
        kinds: `SentencePiece.Type` of each piece.
        unigram: Unigram model; else BPE.
        add_dummy_prefix: A blank is put before the text.
        remove_extra_whitespaces: Runs of blanks become one, those at both ends go.
        charsmap: Compiled normalization rule; empty: none.
    """

    names: Sequence[str]
    scores: Sequence[float]
    kinds: Sequence[int]
    unigram: bool
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool
    charsmap: bytes = b""


def _merges(pieces: Pieces) -> list[tuple[str, str]]:
    """Pairs in the order in which SentencePiece merges them: best score of the result first."""
    usable = {
        name: score
        for name, score, kind in zip(pieces.names, pieces.scores, pieces.kinds, strict=True)
        if kind == NORMAL
    }
    pairs = [
        (-score, index, name[:cut], name[cut:])
        for index, (name, score) in enumerate(usable.items())
        for cut in range(1, len(name))
        if name[:cut] in usable and name[cut:] in usable
    ]
    return [(left, right) for *_, left, right in sorted(pairs)]


def _normalizer(pieces: Pieces) -> Any:
    from tokenizers import Regex, normalizers

    steps: list[Any] = []
    if pieces.charsmap:
        steps.append(normalizers.Precompiled(pieces.charsmap))
    if pieces.remove_extra_whitespaces:
        # Blanks only: line ends and tabs at both ends stay.
        steps += [normalizers.Replace(Regex(p), r) for p, r in ((r"\A +| +\z", ""), (" {2,}", " "))]
    if pieces.add_dummy_prefix:
        steps.append(normalizers.Prepend(BLANK))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", BLANK)])


def fast_tokenizer(pieces: Pieces) -> Any:
    """A `tokenizers.Tokenizer` with these pieces; its control pieces are special tokens.

    Raises:
        UserError: Two ids of one piece, no unknown piece, or a score that is no number.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models

    if len(set(pieces.names)) != len(pieces.names):
        twice = next(n for i, n in enumerate(pieces.names) if n in pieces.names[:i])
        raise UserError(f"the piece {twice!r} has two ids; the vocabulary is damaged")
    if not all(math.isfinite(score) for score in pieces.scores):
        raise UserError("a score is not a finite number; the vocabulary is damaged")
    unknown = [n for n, kind in zip(pieces.names, pieces.kinds, strict=True) if kind == UNKNOWN]
    if len(unknown) != 1:
        raise UserError(f"{len(unknown)} unknown pieces instead of one; the vocabulary is damaged")
    has_bytes = BYTE in pieces.kinds
    if pieces.unigram:
        entries = list(zip(pieces.names, pieces.scores, strict=True))
        model: Any = models.Unigram(
            entries, pieces.names.index(unknown[0]), byte_fallback=has_bytes
        )
    else:
        model = models.BPE(
            vocab={name: index for index, name in enumerate(pieces.names)},
            merges=_merges(pieces),
            unk_token=unknown[0],
            fuse_unk=True,
            byte_fallback=has_bytes,
        )
    backend = Tokenizer(model)
    backend.normalizer = _normalizer(pieces)
    steps = [decoders.Replace(BLANK, " "), decoders.ByteFallback(), decoders.Fuse()]
    if pieces.add_dummy_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    backend.decoder = decoders.Sequence(steps)
    # In the order of their ids: an added token keeps the id that the model knows it by.
    for name, kind in zip(pieces.names, pieces.kinds, strict=True):
        if kind in (UNKNOWN, CONTROL):
            backend.add_special_tokens([AddedToken(name, normalized=False, special=True)])
        elif kind == USER_DEFINED:
            backend.add_tokens([AddedToken(name, normalized=BLANK in name)])
    return backend


def read_sentencepiece(path: Path) -> Any:
    """A `tokenizers.Tokenizer` with the ids that SentencePiece gives for a `.model` file.

    Raises:
        UserError: Not a SentencePiece file, or of a kind whose ids would be others.
    """
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    from sentencepiece import SentencePieceProcessor
    from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]

    proto = ModelProto()
    try:
        proto.ParseFromString(path.read_bytes())
        reference = SentencePieceProcessor(model_proto=proto.SerializeToString())
    except (DecodeError, RuntimeError, OSError) as error:
        raise UserError(
            f"{path}: not a SentencePiece model ({' '.join(str(error).split())}). A tiktoken file "
            "of this name is not read; put tokenizer.json beside it."
        ) from error
    trainer, rule = proto.trainer_spec, proto.normalizer_spec
    if trainer.model_type not in (trainer.UNIGRAM, trainer.BPE):
        raise UserError(f"{path}: only unigram and BPE models are read; put tokenizer.json here.")
    if trainer.treat_whitespace_as_suffix or not rule.escape_whitespaces:
        raise UserError(
            f"{path}: blanks are kept in a way that is not read; put tokenizer.json here."
        )
    backend = fast_tokenizer(
        Pieces(
            names=[piece.piece for piece in proto.pieces],
            scores=[piece.score for piece in proto.pieces],
            kinds=[piece.type for piece in proto.pieces],
            unigram=trainer.model_type == trainer.UNIGRAM,
            add_dummy_prefix=rule.add_dummy_prefix,
            remove_extra_whitespaces=rule.remove_extra_whitespaces,
            charsmap=rule.precompiled_charsmap,
        )
    )
    own = [piece.piece for piece in proto.pieces if piece.type == USER_DEFINED]
    for text in (*_PROBES, f"a {' b '.join(own[:8])} c"):
        if backend.encode(text).ids != reference.encode(text):
            raise UserError(
                f"{path}: SentencePiece splits {text!r} in a way that cannot be rebuilt; put the "
                "model's tokenizer.json beside it."
            )
    return backend


def surround(backend: Any, before: str | None, after: str | None) -> None:
    """Every encoded text begins with the token `before` and ends with `after`."""
    from tokenizers import processors

    tokens = [token for token in (before, after) if token is not None]
    if tokens:
        single = [part for part in (before, "$A", after) if part is not None]
        pairs = [(token, backend.token_to_id(token)) for token in tokens]
        backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=pairs)

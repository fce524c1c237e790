"""Every exporter. A further one is a further line here, and at most three files."""

from mqat.errors import UserError
from mqat.export.exporter import Exporter
from mqat.export.gguf.exporter import GgufExporter
from mqat.export.huggingface.compressed_tensors import COMPRESSED_TENSORS
from mqat.export.huggingface.modelopt import MODELOPT
from mqat.export.nemo.exporter import NemoExporter
from mqat.export.peft.exporter import PeftExporter
from mqat.export.trtllm.exporter import TensorRtLlmExporter

EXPORTERS: tuple[Exporter, ...] = (
    TensorRtLlmExporter(), COMPRESSED_TENSORS, MODELOPT, NemoExporter(), PeftExporter(),
    GgufExporter(),
)  # fmt: skip


def exporter(format_: str, style: str | None = None) -> Exporter:
    """The exporter of `export.format` and `export.style`; without a style, the format's first.

    Raises:
        UserError: An unknown word; lists the known ones.
    """
    found = {e.style: e for e in EXPORTERS if e.format == format_}
    if not found:
        known = dict.fromkeys(e.format for e in EXPORTERS)
        raise UserError(f"export.format={format_!r}: must be one of {', '.join(known)}.")
    if style is None:
        return next(iter(found.values()))
    if style not in found:
        styles = [s for s in found if s is not None]
        allowed = f"must be one of {', '.join(styles)}"
        if not styles:
            with_it = ", ".join(e.format for e in EXPORTERS if e.style == style) or "no format"
            allowed = f"{format_} has none; {with_it} has this style (export.format, --format)"
        raise UserError(f"export.style={style!r}: {allowed}.")
    return found[style]

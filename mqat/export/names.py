"""Names that the exporters still use in this form; goes with their rewrite."""

from mqat.models.structure import CORE_ATTENTION as C
from mqat.models.structure import DENSE_LINEARS, DENSE_NORMS, split_name
from mqat.models.structure import EMBEDDING as E
from mqat.models.structure import FINAL_NORM as N
from mqat.models.structure import HF_LAYER as HF_LAYER
from mqat.models.structure import OUTPUT_LAYER as O
from mqat.models.structure import TRTLLM_LAYER as TRTLLM_LAYER

LINEARS = tuple(x.name for x in DENSE_LINEARS)
HF_EMBEDDING, HF_FINAL_NORM, HF_LM_HEAD = f"{E.hf}.weight", f"{N.hf}.weight", f"{O.hf}.weight"
HF_LINEARS = {x.name: tuple(p.hf for p in x.parts) for x in DENSE_LINEARS}
_FEEDS = {x.norm: x.name for x in DENSE_LINEARS if x.norm}
HF_NORMS = {_FEEDS[n.name]: n.hf for n in DENSE_NORMS}
TRTLLM_NORMS = {_FEEDS[n.name]: n.trtllm for n in DENSE_NORMS}
TRTLLM_EMBEDDING, TRTLLM_FINAL_NORM, TRTLLM_LM_HEAD = E.trtllm, N.trtllm, O.trtllm
TRTLLM_LINEARS = {x.name: tuple(x.trtllm_modules()) for x in DENSE_LINEARS}
CORE_ATTENTION = C.name
QKV, PROJ, FC1, FC2 = LINEARS
ROW_PARALLEL = (PROJ, FC2)


def linear_of(name: str) -> str:
    """Name in the layer."""
    return split_name(name)[1]

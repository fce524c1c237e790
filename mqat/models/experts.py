"""Rows of the table for mixtures: routers, experts, and experts that all tokens go through.

| name of                     | example                                                                |
|-----------------------------|------------------------------------------------------------------------|
| an expert's linear          | `mlp.experts.5.linear_fc1`                                             |
| a shared expert's           | `mlp.shared_experts.linear_fc1`                                        |
| what chooses and weighs     | `mlp.router.weight`, `mlp.router.expert_bias`,                         |
|                             | `mlp.shared_experts.gate_weight`                                       |

Sources: Megatron-Core `transformer/moe/{experts,shared_experts,router}.py`, transformers
`models/{qwen2_moe,glm4_moe}`, TensorRT-LLM `layers/moe.py`.
"""

from dataclasses import dataclass, replace

from mqat.models.structure import (
    EXPERTS,
    FC1,
    FC2,
    MLP_NORM,
    Axis,
    Linear,
    Part,
    stacked_key,
)

# In Megatron-Core's `SharedExpertMLP`: all shared experts of a layer as one.
SHARED_EXPERTS = "mlp.shared_experts"
# Behind it are a router and experts, so that Transformer Engine does not keep it in a linear.
MIXTURE_NORM = replace(MLP_NORM, key="decoder.layers.pre_mlp_layernorm.weight")
# Tensors of a layer in which transformers 5 has the parts of all experts: gate above up; down.
FUSED_EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")


@dataclass(frozen=True)
class Selector:
    """A tensor of a layer that chooses or weighs experts; never quantized.

    Attributes:
        name: Parameter or buffer in a Megatron layer.
        hf: Tensor of Hugging Face, after the family's prefix of a layer.
        trtllm: Tensor of TensorRT-LLM, after `TRTLLM_LAYER`; empty: it has none.
        axes: Of its dimensions.
        is_float32: Whatever the dtype of the model is.
    """

    name: str
    hf: str
    trtllm: str
    axes: tuple[Axis, ...]
    is_float32: bool = False

    @property
    def key(self) -> str:
        """In checkpoints."""
        return stacked_key(*self.name.rsplit(".", 1))


@dataclass(frozen=True)
class Router:
    """What chooses a token's experts.

    Attributes:
        name: In a Megatron layer.
        hf: Hugging Face module, after the family's prefix of a layer.
        trtllm: TensorRT-LLM module, after `TRTLLM_LAYER`.
        correction: What Hugging Face calls, in its module, the numbers [experts] that are added to the
            scores by which experts are chosen, and not to those that weigh them; None: there are none.
        gguf: llama.cpp tensor of the weight without its suffix, after `GGUF_LAYER`.
    """

    name: str
    hf: str
    trtllm: str
    correction: str | None = None
    gguf: str = "ffn_gate_inp"

    @property
    def selectors(self) -> tuple[Selector, ...]:
        """Its tensors."""
        weight = Selector(
            f"{self.name}.weight",
            f"{self.hf}.weight",
            f"{self.trtllm}.weight",
            ("experts", "hidden"),
        )
        if self.correction is None:
            return (weight,)
        hf = f"{self.hf}.{self.correction}"
        bias = Selector(f"{self.name}.expert_bias", hf, "", ("experts",), is_float32=True)
        return (weight, bias)


ROUTER = Router("mlp.router", "mlp.gate", "mlp.router")


@dataclass(frozen=True)
class Shared:
    """The experts of a layer that all tokens go through, as one gated MLP.

    Attributes:
        hf: Prefix of its modules in Hugging Face, after the family's prefix of a layer.
        gate: Hugging Face module, likewise, of the one row whose sigmoid multiplies its output; None:
            nothing does.
    """

    hf: str
    gate: str | None = None

    @property
    def selectors(self) -> tuple[Selector, ...]:
        """The gate, where there is one."""
        if self.gate is None:
            return ()
        return (
            Selector(f"{SHARED_EXPERTS}.gate_weight", f"{self.gate}.weight", "", ("one", "hidden")),
        )


@dataclass(frozen=True)
class Experts:
    """The gated MLPs of a mixture, and what chooses among them.

    Attributes:
        hf: Prefix of an expert's modules in Hugging Face, after the family's prefix of a layer, with its
            number as `{e}`.
        hf_parts: Its gate, up and down projection there, after that prefix; a shared expert's, too.
        router: Before them.
        shared: Beside them; None: every token goes to experts of its own only.
    """

    hf: str
    hf_parts: tuple[str, str, str]
    router: Router
    shared: Shared | None = None

    @property
    def selectors(self) -> tuple[Selector, ...]:
        """Of a layer."""
        return (*self.router.selectors, *(self.shared.selectors if self.shared else ()))


def expert_linears(experts: Experts, count: int) -> tuple[Linear, ...]:
    """The linears of all experts of a layer, expert by expert; then those of a shared one.

    TensorRT-LLM stacks those of experts in `mlp.fc` and `mlp.proj`, with up before gate; llama.cpp in
    three tensors.
    """
    found: list[Linear] = []
    for number in range(count):
        hf = experts.hf.format(e=number)
        found += _gated(f"{EXPERTS}.{number}", hf, experts.hf_parts, "expert_intermediate", number)
    if experts.shared is not None:
        found += _gated(
            SHARED_EXPERTS, experts.shared.hf, experts.hf_parts, "shared_intermediate", None
        )
    return tuple(found)


def _gated(
    name: str, hf: str, hf_parts: tuple[str, str, str], rows: Axis, expert: int | None
) -> tuple[Linear, Linear]:
    """The linears of a gated MLP in a mixture."""
    gate, up, down = hf_parts
    stack = "shexp" if expert is None else "exps"
    fc1 = Linear(
        f"{name}.{FC1.kind}",
        "column",
        "hidden",
        (
            Part(rows, hf + gate, f"ffn_gate_{stack}", "mlp.fc"),
            Part(rows, hf + up, f"ffn_up_{stack}", "mlp.fc"),
        ),
        norm=MIXTURE_NORM.name,
        expert=expert,
        trtllm_order=(1, 0),
    )
    fc2 = Linear(
        f"{name}.{FC2.kind}",
        "row",
        rows,
        (Part("hidden", hf + down, f"ffn_down_{stack}", "mlp.proj"),),
        fed_by=(fc1.name, 1),
        expert=expert,
    )
    return fc1, fc2


def in_mixture(linear: Linear) -> bool:
    """Whether a linear is of an expert, shared or not."""
    return linear.expert is not None or linear.name.startswith(f"{SHARED_EXPERTS}.")

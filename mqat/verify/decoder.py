"""Runs an exported directory: a small decoder in float32 that reads its tensors and nothing else.

It computes what servers compute: rank by rank, with partial sums over tensor-parallel ranks and one
pipeline stage after the other, activations quantized as served. A module is in memory at a time.

Sources: TensorRT-LLM `layers/attention.py`, `layers/mlp.py`, `quantization/layers.py`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mqat.verify.activations import ACTIVATIONS, NORMS
from mqat.verify.adapter import LowRank
from mqat.verify.agreement import add_noise
from mqat.verify.export import Export, Rank
from mqat.verify.reference_quant import quantize_input
from mqat.verify.storage import Module

# On purpose (docs/export.md): W8A16 rounds weights again, ranks take the steps of a token from their own
# channels, and experts of a layer may share a step. All are within the noise of 8 bits, relative.
SERVED_OTHERWISE = 0.1


@dataclass
class Past:
    """What a decoder keeps of the tokens before: keys after rotation and values, quantized as served.

    Attributes:
        tokens: How many.
        heads: Global number of a layer, and of its rank -> [b, groups, tokens, d] of each.
    """

    tokens: int = 0
    heads: dict[tuple[int, str], tuple[Tensor, Tensor]] = field(default_factory=dict)


class Decoder:
    """An exported model, its headers checked.

    Args:
        export: Its directory.
        beside: Module's name in a Hugging Face directory -> what an adapter adds to it.
        keeps_weights: Holds all of them in float32 once they were read: to compute token by token.

    Attributes:
        export: The directory.
        model: What its config describes.
        max_positions: Longest sequence.
        is_compared_alike: The trainer that it is compared with shares the steps of experts' inputs, too.
    """

    def __init__(
        self,
        export: Export,
        beside: Mapping[str, LowRank] | None = None,
        *,
        keeps_weights: bool = False,
    ) -> None:
        self.export, self._beside = export, beside or {}
        for rank in (rank for stage in export.stages for rank in stage):
            rank.keeps_weights = keeps_weights
        self._keeps_weights, self._tables = keeps_weights, dict[tuple[str, int], Tensor]()
        self._past: Past | None = None
        self.is_compared_alike = False
        self.model = export.model
        self._noise, self._generator = 0.0, torch.Generator()
        self.max_positions = self.model.value("max_position_embeddings")

    def _inner(self, rank: Rank, layer: int, roles: tuple[str, ...], x: Tensor) -> list[Tensor]:
        """One rank's features of column-parallel linears."""
        found: dict[str, Tensor] = {}
        for module in self.export.modules(layer):
            if module.parts[0].role not in roles:
                continue
            product = self._with_adapter(rank, module, self._noisy(x))
            found |= module.by_part(product + _bias(rank, module), dim=-1)
        return [found[role] for role in roles]

    def _sum(self, ranks: Sequence[Rank], layer: int, role: str, inner: Sequence[Tensor]) -> Tensor:
        """A row-parallel linear of every rank's features; its bias is added once."""
        module = next(m for m in self.export.modules(layer) if m.parts[0].role == role)
        products = [
            self._with_adapter(rank, module, self._noisy(x))
            for rank, x in zip(ranks, inner, strict=True)
        ]
        return torch.stack(products).sum(0) + _bias(ranks[0], module)

    def _with_adapter(self, rank: Rank, module: Module, x: Tensor) -> Tensor:
        product, adapter = _product(rank, module, x), self._beside.get(module.name)
        return product if adapter is None else product + adapter(x)

    def _norm(self, rank: Rank, layer: int, role: str, x: Tensor) -> Tensor:
        name = self.model.facts.norms[role][self.model.form]
        return self._normed(rank, f"{self.model.prefix(layer)}{name}", x)

    def _normed(self, rank: Rank, name: str, x: Tensor) -> Tensor:
        """A norm along the last dimension, by its full name."""
        model, facts = self.model, self.model.facts
        weight = rank.tensor(f"{name}.weight").float() + (model.form in facts.one_less)
        normed = NORMS[facts.norm](x, float(model.value("rms_norm_eps"))) * weight
        return normed + rank.tensor(f"{name}.bias").float() if facts.norm == "layer" else normed

    def _added(self, rank: Rank, layer: int, role: str, x: Tensor) -> Tensor:
        """What attention or MLP adds to the hidden states, normalized where the model does that."""
        return self._norm(rank, layer, role, x) if role in self.model.facts.norms else x

    def _attention(self, rank: Rank, layer: int, number: int, x: Tensor) -> Tensor:
        """One rank's heads, causal, before the output's linear; keys are cached after rotation.

        `layer` counts in its stage, `number` in the model.
        """
        heads, roles, cache = {}, ("query", "key", "value"), self.export.cache
        for role, features in zip(roles, self._inner(rank, layer, roles, x), strict=True):
            part = features.unflatten(-1, (-1, self.model.on_rank["head"])).transpose(1, 2)
            if f"{role}_norm" in self.model.facts.norms:  # of each head
                part = self._norm(rank, layer, f"{role}_norm", part)
            if role != "value" and "positions" not in self.model.names:
                part = self.model.positions.rotate(part, number, self._first)
            if cache is not None and role in cache.names:
                step = rank.tensor(self.model.prefix(layer) + cache.names[role])
                part = quantize_input(part, "static fp8" if cache.is_float else "static int8", step)
            heads[role] = part
        q, k, v = (heads[role] for role in roles)
        k, v = self._with_past((number, rank.label), k, v)
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
        context = self.model.positions.attend(q, k, v, number)
        return context.transpose(1, 2).flatten(2)

    @property
    def _first(self) -> int:
        """Position of the first token of this pass."""
        return 0 if self._past is None else self._past.tokens

    def _with_past(self, place: tuple[int, str], k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the tokens before, and these, which are kept."""
        if self._past is None:
            return k, v
        if place in self._past.heads:
            before = zip(self._past.heads[place], (k, v), strict=True)
            k, v = (torch.cat(parts, dim=2) for parts in before)
        self._past.heads[place] = k, v
        return k, v

    def _mlp(self, rank: Rank, layer: int, x: Tensor) -> Tensor:
        facts = self.model.facts_of(layer)
        activate = ACTIVATIONS[facts.activation]
        roles = ("gate", "up") if "gate" in facts.parts else ("up",)
        first, *others = self._inner(rank, layer, roles, x)
        return activate(first) * others[0] if others else activate(first)

    def modules(self, number: int) -> list[Module]:
        """The linears of a layer, by its global number."""
        return self.export.modules(number % self.model.layers_per_stage)

    @property
    def shares_steps(self) -> bool:
        """Whether a layer's experts have one step of inputs, where each was trained with its own."""
        layers = range(self.model.value("num_layers"))
        return any(m.shares_input_scale for number in layers for m in self.modules(number))

    def serves_otherwise(self, number: int) -> bool:
        """Whether a layer computes something else than was trained, by at most `SERVED_OTHERWISE`."""
        is_cut = self.model.tp > 1
        return any(
            m.storage.is_reloaded
            or (m.shares_input_scale and not self.is_compared_alike)
            or (m.is_row_parallel and is_cut and (m.storage.input or "").startswith("token"))
            for m in self.modules(number)
        )

    def _noisy(self, x: Tensor) -> Tensor:
        return add_noise(x, self._noise, self._generator)

    @torch.no_grad()
    def layer(self, number: int, x: Tensor) -> Tensor:
        """One layer, by its global number, of hidden states float32 [b, s, hidden]."""
        stage, layer = divmod(number, self.model.layers_per_stage)
        ranks = self.export.stages[stage]
        normed = self._norm(ranks[0], layer, "attention_norm", x)
        inner = [self._attention(rank, layer, number, normed) for rank in ranks]
        output = self._sum(ranks, layer, "output", inner)
        x = x + self._added(ranks[0], layer, "attention_output_norm", output)
        normed = self._norm(ranks[0], layer, "mlp_norm", x)
        if self.model.has_experts(layer):
            return x + self._mixture(ranks, layer, normed)
        inner = [self._mlp(rank, layer, normed) for rank in ranks]
        output = self._sum(ranks, layer, "down", inner)
        return x + self._added(ranks[0], layer, "mlp_output_norm", output)

    def _mixture(self, ranks: Sequence[Rank], layer: int, x: Tensor) -> Tensor:
        """Experts of each token, each with its weight, and the shared ones of all tokens."""
        model, tokens = self.model, x.flatten(0, 1)
        scores = tokens @ self._selector(ranks[0], layer, "router").t()
        correction: Tensor | float = 0.0
        if model.facts.experts.get("scores") == "sigmoid":
            scores, correction = scores.sigmoid(), self._selector(ranks[0], layer, "correction")
        else:
            scores = scores.softmax(-1)
        chosen = self._chosen(scores + correction)
        weights = scores.gather(-1, chosen)
        if model.normalizes:
            weights = weights / weights.sum(-1, keepdim=True)
        weights = weights * model.expert_weight_scale
        modules = {
            part.role: module for module in self.export.modules(layer) for part in module.parts
        }
        total = torch.zeros_like(tokens)
        if "shared" in model.facts.experts:
            total = self._gated(ranks, modules, "shared", tokens)
            if "shared_gate" in model.facts.selectors():
                gate = self._selector(ranks[0], layer, "shared_gate")
                total = total * (tokens @ gate.t()).sigmoid()
        for number in range(model.value("num_experts")):
            rows, place = (chosen == number).nonzero(as_tuple=True)
            if not len(rows):
                continue
            output = self._gated(ranks, modules, str(number), tokens[rows])
            total[rows] += weights[rows, place, None] * output
        return total.view_as(x)

    def _selector(self, rank: Rank, layer: int, role: str) -> Tensor:
        """A router's weight, or what is beside it."""
        name = self.model.facts.selectors()[role][self.model.form]
        return rank.tensor(self.model.prefix(layer) + name).float()

    def _chosen(self, scores: Tensor) -> Tensor:
        """Numbers of each token's experts, of scores [t, E], from its best groups of neighbours."""
        model = self.model
        groups = model.value("expert_groups") or 1
        kept = model.value("expert_groups_per_token") or 1
        if kept < groups:
            of_groups = scores.unflatten(-1, (groups, -1))
            best = of_groups.topk(2, dim=-1).values.sum(-1).topk(kept, dim=-1).indices
            outside = torch.ones(of_groups.shape[:2], dtype=torch.bool).scatter(1, best, False)
            scores = of_groups.masked_fill(outside[..., None], float("-inf")).flatten(1)
        return scores.topk(model.value("experts_per_token"), dim=-1).indices

    def _gated(
        self, ranks: Sequence[Rank], modules: dict[str, Module], owner: str, tokens: Tensor
    ) -> Tensor:
        """The MLP of an expert, or of the shared ones."""
        gate, up, down = (modules[f"{role} {owner}"] for role in ("gate", "up", "down"))
        own, products = self._noisy(tokens), []
        activate = ACTIVATIONS[self.model.facts.activation]
        for rank in ranks:
            features: dict[str, Tensor] = {}
            for module in (gate,) if gate == up else (gate, up):
                features |= module.by_part(_product(rank, module, own), dim=-1)
            inner = activate(features[f"gate {owner}"]) * features[f"up {owner}"]
            products.append(_product(rank, down, self._noisy(inner)))
        return torch.stack(products).sum(0)

    @torch.no_grad()
    def linears(self, number: int, role: str, x: Tensor) -> dict[str, Tensor]:
        """The module of a linear alone, of whole inputs float32 [t, I]: output features [O, t] by role.

        Steps of a token come from all its channels, as in training.
        """
        ranks = self.export.stages[number // self.model.layers_per_stage]
        module = next(m for m in self.modules(number) if role in [part.role for part in m.parts])
        if not module.is_row_parallel:
            outputs = [_product(rank, module, x) + _bias(rank, module) for rank in ranks]
            return module.join([output.t() for output in outputs])
        if is_of_token := (module.storage.input or "").startswith("token"):
            x = quantize_input(x, module.storage.input)
        pieces = zip(ranks, x.chunk(len(ranks), dim=-1), strict=True)
        products = [
            _product(rank, module, piece, quantizes=not is_of_token) for rank, piece in pieces
        ]
        return {role: (torch.stack(products).sum(0) + _bias(ranks[0], module)).t()}

    @torch.no_grad()
    def logits(self, tokens: Tensor, noise: float = 0.0, past: Past | None = None) -> Tensor:
        """Next-token logits, float32 [b, s, V], for tokens int64 [b, s].

        With `noise`, of that relative size on the input of every linear: its answer to rounding. With
        `past`, of the tokens behind those that it holds; these are added to it.
        """
        model, stages = self.model, self.export.stages
        self._past, first = past, past.tokens if past is not None else 0
        x = self._table("embedding", 0)[tokens].float() * model.embedding_scale
        if "positions" in model.names:
            x = x + self._table("positions", 0)[first : first + tokens.shape[1]].float()
        self._noise, self._generator = noise, torch.Generator().manual_seed(0)
        try:
            for number in range(model.layers_per_stage * model.pp):
                x = self.layer(number, x)
        finally:
            self._noise, self._past = 0.0, None
        if past is not None:
            past.tokens += tokens.shape[1]
        x = self._normed(stages[-1][0], model.names["final_norm"], x)
        role, stage = ("embedding", 0) if model.is_tied else ("lm_head", -1)
        return model.positions.capped(x @ self._table(role, stage).float().t())

    def _table(self, role: str, stage: int) -> Tensor:
        if (role, stage) not in self._tables:
            table = self.export.table(role, stage)
            if not self._keeps_weights:
                return table
            self._tables[role, stage] = table.float()
        return self._tables[role, stage]


def _product(rank: Rank, module: Module, x: Tensor, *, quantizes: bool = True) -> Tensor:
    """One rank's product, without the sum over ranks and without a bias."""
    linear, weight = rank.served(module)
    if "smoothing" in linear.tensors:
        x = x * linear.tensors["smoothing"].float()
    # A rank takes the step of a token from its own channels.
    kind = module.storage.input if quantizes else None
    x = quantize_input(x, kind, linear.input_step())
    return x @ weight.t()


def _bias(rank: Rank, module: Module) -> Tensor:
    return rank.tensor(module.full("bias")).float() if "bias" in module.suffixes else torch.zeros(1)

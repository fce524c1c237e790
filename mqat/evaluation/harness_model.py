"""What lm-evaluation-harness asks a model: likelihoods of answers and of whole texts, and text.

Only imported where the package `lm_eval` is installed (`evaluation/harness.py`).
"""

from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval.api.model import TemplateLM

from mqat.data.chat import chat_template
from mqat.errors import UserError
from mqat.evaluation.generation import Limits, generate
from mqat.evaluation.sampling import Sampling
from mqat.evaluation.scoring import Request, score, total_loss, windows
from mqat.evaluation.text_model import TextModel

_MAX_TOKENS = 256  # what its Hugging Face backend generates where a task does not say
# Keys of a task's generation settings that are understood.
_KEYS = ("until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k")


class HarnessModel(TemplateLM):  # type: ignore[misc]
    """A text model, all of whose ranks are given the same requests and get the same answers.

    So this is rank 0 of 1 to the harness: `scoring` and `generation` share the work over ranks.
    """

    def __init__(self, model: TextModel, *, batch_size: int, longest: int | None = None) -> None:
        super().__init__()
        self.model, self.tokenizer = model, model.tokenizer
        self.longest = longest or model.longest
        self.requests_at_once = batch_size
        begins = self.tokenizer.bos_token_id
        self._prefix = self.tokenizer.eos_token_id if begins is None else begins
        if self._prefix is None:
            raise UserError(
                "the tokenizer has neither a begin nor an end token, behind which a text's first token "
                "is scored; name one in its tokenizer_config.json."
            )

    @property
    def eot_token_id(self) -> int:
        """The end token."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text's first token."""
        return int(self._prefix)

    @property
    def tokenizer_name(self) -> str:
        """For the harness's own caches."""
        return type(self.tokenizer).__name__

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Ids, as the tokenizer begins a text, unless that begins so already."""
        prefix = self.tokenizer.decode([self._prefix])
        begins = not string.startswith(prefix) if add_special_tokens is None else add_special_tokens
        return list(self.tokenizer(string, add_special_tokens=begins, verbose=False)["input_ids"])

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        asked = []
        for _name, context, continuation in requests:
            if len(continuation) > self.longest:
                raise UserError(
                    f"a task asks for an answer of {len(continuation)} tokens, longer than the "
                    f"{self.longest} of a sequence; raise --seq-length, or leave the task out."
                )
            room = self.longest + 1 - len(continuation)
            asked.append(Request(context[-room:], continuation))
        found = score(self.model, asked, batch_size=self.requests_at_once)
        return [(one.total, one.is_greedy) for one in found]

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Of whole texts: each token once, in windows as long as they may be."""
        asked = [
            list(windows([self._prefix, *self.tok_encode(text)], self.longest, self.longest))
            for (text,) in (request.args for request in requests)
        ]
        flat = [window for text in asked for window in text]
        found = iter(score(self.model, flat, batch_size=self.requests_at_once))
        return [-total_loss([next(found) for _ in text]) for text in asked]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Text up to the first of a task's stop strings."""
        texts = [""] * len(requests)
        by_settings: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            by_settings.setdefault(repr(request.args[1]), []).append(number)
        for numbers in by_settings.values():
            limits, sampling = _settings(requests[numbers[0]].args[1])
            room = self.longest - limits.max_tokens
            if room < 1:
                raise UserError(
                    f"a task generates {limits.max_tokens} tokens, and a sequence has at most "
                    f"{self.longest}; raise --seq-length, or leave the task out."
                )
            prompts = [self.tok_encode(requests[number].args[0])[-room:] for number in numbers]
            answers, _ = generate(
                self.model, prompts, limits, sampling=sampling, batch_size=self.requests_at_once
            )
            for number, answer in zip(numbers, answers, strict=True):
                texts[number] = answer.text
        return texts

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A chat as the tokenizer's template writes it."""
        template = chat_template(self.tokenizer)
        if template is None:
            raise UserError("--chat: the tokenizer has no chat template; leave it out.")
        written = self.tokenizer.apply_chat_template(
            chat_history, chat_template=template, tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )  # fmt: skip
        return str(written)


def _settings(given: Mapping[str, Any]) -> tuple[Limits, Sampling]:
    """Of a task's generation settings.

    Raises:
        UserError: A key that would not be honoured.
    """
    unknown = sorted(given.keys() - set(_KEYS))
    if unknown:
        raise UserError(
            f"a task's generation_kwargs have {', '.join(unknown)}, which is not honoured here; those "
            f"that are: {', '.join(_KEYS)}."
        )
    stop = given.get("until") or ()
    stop = (stop,) if isinstance(stop, str) else tuple(stop)
    temperature = float(given.get("temperature") or 0.0)
    if not given.get("do_sample", temperature > 0):
        temperature = 0.0
    elif temperature == 0:
        temperature = 1.0
    is_sampled = temperature > 0
    sampling = Sampling(
        temperature,
        given.get("top_k") if is_sampled else None,
        float(given.get("top_p") or 1.0) if is_sampled else 1.0,
    )
    return Limits(int(given.get("max_gen_toks", _MAX_TOKENS)), stop), sampling

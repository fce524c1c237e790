"""Conversations as tokens, and which of the tokens are an assistant's answer.

The template writes the conversation twice: as it is, and with every word replaced by a private
character of its own. The second text says where each word of the first comes from, so that labels are
the words of answers, however a template trims, moves or surrounds them, and words that it leaves out
are noticed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import lru_cache
from itertools import takewhile
from typing import Any

from mqat.data.chat_words import CLOSE, OPEN, Leaf, Span, Words, searched, with_marks
from mqat.data.messages import REASONING, Message, read_message
from mqat.errors import UserError

_WITHOUT_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% else %}{{ '\\n' }}{% endif %}"
    "{% endfor %}"
)


def chat_template(tokenizer: Any, tools: Sequence[Any] = ()) -> str | None:
    """The tokenizer's template; None: it has none. With tools, `tool_use` goes before `default`.

    Raises:
        UserError: It has several, and none of them is called `default`, as transformers asks for.
    """
    template: str | dict[str, str] | None = tokenizer.chat_template
    if not isinstance(template, dict):
        return template
    if tools and "tool_use" in template:
        return template["tool_use"]
    if "default" not in template:
        raise UserError(
            f"the tokenizer has the chat templates {sorted(template)} and none called 'default', so "
            "none can be chosen; name one of them 'default' in tokenizer_config.json"
        )
    return template["default"]


def _solid(text: str) -> str:
    return "".join(text.split())


class _Conversation:
    """One conversation under one template: its text, and the character ranges of what is learnt."""

    def __init__(self, tokenizer: Any, messages: list[Message], tools: Sequence[Any]) -> None:
        self.tokenizer, self.tools = tokenizer, tools
        self.messages = [{k: v for k, v in m.items() if k != "weight"} for m in messages]
        self.learnt = [m["role"] == "assistant" and m.get("weight", 1) == 1 for m in messages]
        self.template = chat_template(tokenizer, tools) or _WITHOUT_TEMPLATE
        self.whole = self._render(self.messages)
        said = json.dumps([self.messages, list(tools)], ensure_ascii=False)
        if OPEN in said + self.whole or CLOSE in said + self.whole:
            raise UserError("U+10FFFE and U+10FFFF are no characters of a text")
        self.words = Words(searched(self.template), said + self.whole)
        self.marked = [self.words.message(m, i) for i, m in enumerate(self.messages)]
        marked_tools = self.words.tools(tools)
        source = with_marks(self.template)
        text = self._render(self.marked, template=source, tools=marked_tools)
        found, self.places, self.marks = self.words.find(text)
        self.has_marks = source is not None
        if found != self.whole:
            raise UserError(
                "the tokenizer's chat template treats messages by their words, so answers cannot be "
                "told from the rest; set a template that writes them as they are"
            )

    def _render(
        self,
        messages: Sequence[Message],
        *,
        prompt: bool = False,
        template: str | None = None,
        tools: Any = None,
    ) -> str:
        """The text that transformers gives for some messages."""
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    list(messages),
                    tools=list(self.tools if tools is None else tools) or None,
                    tokenize=False,
                    add_generation_prompt=prompt,
                    chat_template=template or self.template,
                )
            )
        except Exception as error:  # templates raise what they like; Jinja, anything in between
            raise UserError(f"the tokenizer's chat template refuses it: {error}") from error

    def spans(self) -> list[Span]:
        """Character ranges of the labels, in order.

        Raises:
            UserError: Something that is said is not in the text, or cannot be told from the rest of it.
        """
        self._check_complete()
        if self.has_marks:
            return self._marked_spans()
        return [span for i, learnt in enumerate(self.learnt) if learnt for span in self._answer(i)]

    def _check_complete(self) -> None:
        for leaf in self.words.leaves:
            missing = [code for code in leaf.codes if code not in self.places]
            is_answer = leaf.index >= 0 and self.messages[leaf.index]["role"] == "assistant"
            if not missing or (is_answer and not self.learnt[leaf.index]):
                continue
            if leaf.kind == "tool":
                raise UserError(f"the chat template does not show the tool {leaf.text!r}")
            raise UserError(
                f"the chat template leaves out {len(missing)} of {len(leaf.codes)} words of message "
                f"{leaf.index + 1} ({self.messages[leaf.index]['role']}, {leaf.kind!r}: "
                f"{leaf.text.strip()[:40]!r}); split the conversation after this answer, mark the "
                "answer with weight 0, or set a template that shows it"
            )

    def _marked_spans(self) -> list[Span]:
        """What the template marks, without the answers that are not learnt."""
        owners = [
            (span, leaf.index)
            for leaf in self.words.leaves
            for code in leaf.codes
            for span in self.places.get(code, [])
        ]
        kept = []
        for start, stop in self.marks:
            inside = {index for (a, b), index in owners if a >= start and b <= stop}
            others = [i for i in inside if i < 0 or self.messages[i]["role"] != "assistant"]
            if others:
                raise UserError(
                    "the chat template's generation marks cover more than answers (message "
                    f"{others[0] + 1}); set a template that marks answers only"
                )
            if all(self.learnt[i] for i in inside):
                kept.append((start, stop))
        for (a, b), index in owners:
            if index >= 0 and self.learnt[index] and not any(s <= a and b <= e for s, e in kept):
                raise UserError(
                    f"the chat template's generation marks leave out words of message {index + 1} "
                    f"({self.whole[a:b]!r}); set a template that marks all of an answer"
                )
        return kept

    def _answer(self, index: int) -> list[Span]:
        """The words of an answer, and its end token."""
        leaves = [leaf for leaf in self.words.leaves if leaf.index == index and leaf.kind != "name"]
        if any(len(self.places[code]) > 1 for leaf in leaves for code in leaf.codes):
            raise UserError(f"the chat template writes words of message {index + 1} twice")
        places = [(self.places[code][0], leaf) for leaf in leaves for code in leaf.codes]
        (start, _), first = min(places, key=lambda place: place[0])
        (_, stop), last = max(places, key=lambda place: place[0])
        calls = "tool_calls" in self.messages[index]
        if calls or any(key in self.messages[index] for key in REASONING):
            start = self._turn_start(index, start)
        else:
            start = self._extend_left(first, start)
        if not calls:
            stop = self._extend_right(last, stop)
        span = _solid(self.whole[start:stop])
        for leaf in leaves:
            if leaf.kind != "call" and _solid(leaf.text) not in span:
                raise UserError(
                    f"the chat template rewrites message {index + 1} ({leaf.text.strip()[:40]!r}), so "
                    "its answer is not what the data say; set a template that writes it as it is"
                )
        return self._with_end(index, start, stop, calls=calls)

    def _extend_left(self, leaf: Leaf, start: int) -> int:
        """`start`, moved before the signs and blanks that an answer begins with."""
        head = leaf.head
        reach = self.whole[max(0, start - 2 * len(head) - 64) : start]
        found = re.search(r"\s*".join(map(re.escape, _solid(head))) + r"\s*\Z", reach)
        if _solid(head) and found:
            start -= len(reach) - found.start()
        return start - self._shown_blanks(leaf, left=True)

    def _extend_right(self, leaf: Leaf, stop: int) -> int:
        """`stop`, moved behind the signs and blanks that an answer ends with."""
        tail = leaf.tail
        reach = self.whole[stop : stop + 2 * len(tail) + 64]
        found = re.match(r"\s*" + r"\s*".join(map(re.escape, _solid(tail))), reach)
        if _solid(tail) and found:
            stop += found.end()
        return stop + self._shown_blanks(leaf, left=False)

    def _shown_blanks(self, leaf: Leaf, *, left: bool) -> int:
        """How many blanks at that end of a content the template writes: the text is shorter without."""
        bare = leaf.text.lstrip() if left else leaf.text.rstrip()
        if bare == leaf.text or leaf.kind != "content":
            return 0
        messages = list(self.messages)
        messages[leaf.index] = messages[leaf.index] | {"content": bare}
        return len(self.whole) - len(self._render(messages))

    def _turn_start(self, index: int, first_word: int) -> int:
        """Where an answer with reasoning or calls begins: behind what the template prompts it with."""
        before = self.messages[:index]
        candidates = []
        word = self.words.unused()
        for messages, prompt in (
            (before, True),
            ([*before, {"role": "assistant", "content": word}], False),
        ):
            try:
                text = self._render(messages, prompt=prompt).split(word)[0] if messages else ""
            except UserError:
                continue
            for prefix in (text, text.rstrip()):
                if self.whole.startswith(prefix) and len(prefix) <= first_word:
                    candidates.append(len(prefix))
                    break
        if not candidates:
            raise UserError(
                f"the chat template does not say where message {index + 1} begins, which has a "
                "tool call or reasoning; mark answers in the template with {% generation %}"
            )
        return max(candidates)

    def _with_end(self, index: int, start: int, stop: int, *, calls: bool) -> list[Span]:
        """The answer's range, and that of the token that ends the turn, if the template writes one."""
        closing = self._closing(index, stop)
        if calls:
            return [(start, stop + len(closing.rstrip()))]
        chunk = re.match(r"\s*(\S+)", closing)
        if chunk is None:
            return [(start, stop)]
        special = _end_tokens(self.tokenizer, len(self.tokenizer))
        length = next((n for n in range(len(chunk[1]), 0, -1) if chunk[1][:n] in special), 0)
        if not length:
            tag = re.match(r"<[^<>\s]+>", chunk[1])
            length = tag.end() if tag else 0
        end = stop + chunk.start(1)
        return [(start, stop), (end, end + length)] if length else [(start, stop)]

    def _closing(self, index: int, stop: int) -> str:
        """What the template writes behind an answer whatever comes next."""
        rest = self.whole[stop:]
        if index + 1 == len(self.messages):
            return rest
        try:
            alone, places, _ = self.words.find(self._render(self.marked[: index + 1]))
        except UserError:  # the template refuses this beginning
            return rest
        last = self._last(index, places)
        if last is None:  # or shows no word of it
            return rest
        behind = stop + last - (self._last(index, self.places) or 0)
        same = zip(rest, alone[behind:], strict=False)
        return "".join(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], same))

    def _last(self, index: int, places: dict[str, list[Span]]) -> int | None:
        """Where the last word of an answer ends; None: it has none in the text."""
        codes = (c for leaf in self.words.leaves if leaf.index == index for c in leaf.codes)
        return max((places[code][0][1] for code in codes if code in places), default=None)


@lru_cache(maxsize=4)
def _end_tokens(tokenizer: Any, entries: int) -> set[str]:
    return {*tokenizer.added_tokens_encoder, *tokenizer.all_special_tokens}


def _attempts(messages: list[Message]) -> list[list[Message]]:
    """Messages whose calls have their arguments as objects, as servers hand them on; then as given."""

    def parsed(call: Any) -> Any:
        function = call.get("function", call)
        try:
            arguments = json.loads(function.get("arguments", ""))
        except (TypeError, ValueError):
            return call
        if not isinstance(arguments, dict):
            return call
        changed = function | {"arguments": arguments}
        return call | {"function": changed} if "function" in call else changed

    objects = [
        m | {"tool_calls": [parsed(call) for call in m["tool_calls"]]} if "tool_calls" in m else m
        for m in messages
    ]
    return [objects] if objects == messages else [objects, messages]


def tokenize_conversation(
    messages: Sequence[Message], tokenizer: Any, tools: Sequence[Any] = ()
) -> tuple[list[int], list[bool]]:
    """Token ids, and which of them belong to an assistant's answer (its end token included).

    A template with `{% generation %}` blocks says itself what an answer is. For others it is the
    answer's words and the token that ends its turn; with calls or reasoning, all that the model writes.
    Without a template, messages follow each other on lines and answers close with the end token.

    Args:
        messages: As `messages.read_message` takes them; those with weight 0 are context.
        tokenizer: Transformers tokenizer.
        tools: Definitions of the tools that the assistant may call.

    Raises:
        ValueError: The template refuses the conversation, leaves out or rewrites what is said.
    """
    checked = [read_message(message) for message in messages]
    attempts = _attempts(checked)
    for attempt in attempts:
        try:
            conversation = _Conversation(tokenizer, attempt, tools)
            spans = conversation.spans()
            break
        except UserError:
            if attempt is attempts[-1]:
                raise
    # The template has written the special tokens already.
    encoded = tokenizer(
        conversation.whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False
    )
    answer, last = [], 0
    for start, stop in encoded["offset_mapping"]:
        # A token of blanks may have lost its range (`trim_offsets`): it begins where the last one ends.
        begin = min(start, last) if start == stop else start
        answer.append(
            any(begin < span_stop and stop > span_start for span_start, span_stop in spans)
        )
        last = stop
    return list(encoded["input_ids"]), answer

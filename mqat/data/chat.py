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
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import takewhile
from typing import Any

from mqat.data.messages import REASONING, Message, read_message
from mqat.errors import UserError

_WITHOUT_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% else %}{{ '\\n' }}{% endif %}"
    "{% endfor %}"
)
# Planes 15 and 16 are for private use; the last two characters stand around what a template marks.
_PRIVATE = re.compile("[\U000f0000-\U0010ffff]")
_OPEN, _CLOSE = "\U0010fffe", "\U0010ffff"
# trim_blocks, which transformers sets, removes the line end.
_MARKING = f"{{% macro mqat_answer() %}}{_OPEN}{{{{ caller() }}}}{_CLOSE}{{% endmacro %}}\n"
Span = tuple[int, int]


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


@lru_cache(maxsize=64)
def _with_marks(template: str) -> str | None:
    """The template whose `{% generation %}` blocks write `_OPEN` and `_CLOSE`; None: it has none.

    Raises:
        UserError: Not a Jinja template.
    """
    from jinja2 import Environment, TemplateError

    names = {"generation": "call mqat_answer()", "endgeneration": "endcall"}
    written, starts_block, has_marks = [_MARKING], False, False
    try:
        for _, kind, text in Environment(trim_blocks=True, lstrip_blocks=True).lex(template):
            if starts_block and kind == "name" and text in names:
                has_marks, text = True, names[text]
            if kind != "whitespace":
                starts_block = kind == "block_begin"
            written.append(text)
    except TemplateError as error:
        raise UserError(f"the tokenizer's chat template is no template: {error}") from error
    return "".join(written) if has_marks else None


@lru_cache(maxsize=64)
def _searched(template: str) -> re.Pattern[str]:
    """Matches what a template may look for inside messages (`'</think>' in content`), or else a word."""
    from jinja2 import Environment, nodes

    tree = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(
        _with_marks(template) or template
    )
    looked_for = [test.expr for test in tree.find_all(nodes.Compare)]
    looked_for += [argument for call in tree.find_all(nodes.Call) for argument in call.args]
    constants = {node.value for node in looked_for if isinstance(node, nodes.Const)}
    constants |= {
        node.value for node in tree.find_all(nodes.Const) if re.search(r"[^\w\s]", str(node.value))
    }
    texts = [text for text in constants if isinstance(text, str) and text.strip()]
    literals = "|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True))
    return re.compile(rf"(?:{literals})|((?:(?!{literals})\w)+)" if literals else r"(\w+)")


def _solid(text: str) -> str:
    return "".join(text.split())


@dataclass
class _Leaf:
    """One text of a message, its words as private characters, and what stands before and after them."""

    index: int
    kind: str
    text: str
    codes: list[str] = field(default_factory=list)
    head: str = ""
    tail: str = ""


class _Words:
    """Replaces the words of messages by private characters and finds them again."""

    def __init__(self, pattern: re.Pattern[str], taken: str) -> None:
        used = set(_PRIVATE.findall(taken))
        self._free = (c for c in map(chr, range(0xF0000, 0x10FFFE)) if c not in used)
        self._pattern = pattern
        self.originals: dict[str, str] = {}
        self.leaves: list[_Leaf] = []

    def unused(self) -> str:
        """A private character that stands for nothing yet."""
        code = next(self._free, None)
        if code is None:
            raise UserError("a conversation of more than 131,000 words is too long; split it")
        return code

    def _code(self, leaf: _Leaf, word: str) -> str:
        code = self.unused()
        self.originals[code] = word
        leaf.codes.append(code)
        return code

    def text(self, text: str, index: int, kind: str) -> str:
        leaf = _Leaf(index, kind, text)
        spans: list[Span] = []

        def replace(match: re.Match[str]) -> str:
            if match[1] is None:
                return match[0]
            spans.append(match.span())
            return self._code(leaf, match[0])

        marked = self._pattern.sub(replace, text)
        if not spans and text.strip():
            core = text.strip()
            start = text.index(core)
            spans.append((start, start + len(core)))
            marked = text[:start] + self._code(leaf, core) + text[start + len(core) :]
        if spans:
            leaf.head, leaf.tail = text[: spans[0][0]], text[spans[-1][1] :]
            self.leaves.append(leaf)
        return marked

    def value(self, value: Any, index: int, kind: str) -> Any:
        """Every text inside a JSON value but the kind and the id of a call."""
        if isinstance(value, str):
            return self.text(value, index, kind)
        if isinstance(value, list):
            return [self.value(entry, index, kind) for entry in value]
        if isinstance(value, dict):
            return {
                key: entry
                if key in ("type", "id") and kind == "call"
                else self.value(entry, index, kind)
                for key, entry in value.items()
            }
        return value

    def message(self, message: Message, index: int) -> Message:
        marked = dict(message)
        for key, value in message.items():
            if key == "tool_calls":
                marked[key] = self.value(value, index, "call")
            elif (
                key == "content"
                or key in REASONING
                or (key == "name" and message["role"] != "tool")
            ):
                marked[key] = self.text(value, index, key)
        return marked

    def tools(self, tools: Sequence[Any]) -> list[Any]:
        """Only names: what else a template shows of a definition differs between models."""
        marked = []
        for tool in tools:
            if isinstance(tool.get("function"), dict):
                name = self.text(tool["function"]["name"], -1, "tool")
                marked.append(tool | {"function": tool["function"] | {"name": name}})
            else:
                marked.append(tool | {"name": self.text(tool["name"], -1, "tool")})
        return marked

    def find(self, marked: str) -> tuple[str, dict[str, list[Span]], list[Span]]:
        """The text without replacements, where each of them stands, and the template's own marks."""
        pieces: list[str] = []
        places: dict[str, list[Span]] = {}
        marks: list[Span] = []
        opened: list[int] = []
        position = last = 0
        for match in _PRIVATE.finditer(marked):
            code = match[0]
            if code not in self.originals and code not in (_OPEN, _CLOSE):
                continue
            pieces.append(marked[last : match.start()])
            position += match.start() - last
            last = match.end()
            if code == _OPEN:
                opened.append(position)
            elif code == _CLOSE:
                start = opened.pop() if opened else position
                if not opened and position > start:
                    marks.append((start, position))
            else:
                word = self.originals[code]
                places.setdefault(code, []).append((position, position + len(word)))
                pieces.append(word)
                position += len(word)
        pieces.append(marked[last:])
        return "".join(pieces), places, marks


class _Conversation:
    """One conversation under one template: its text, and the character ranges of what is learnt."""

    def __init__(self, tokenizer: Any, messages: list[Message], tools: Sequence[Any]) -> None:
        self.tokenizer, self.tools = tokenizer, tools
        self.messages = [{k: v for k, v in m.items() if k != "weight"} for m in messages]
        self.learnt = [m["role"] == "assistant" and m.get("weight", 1) == 1 for m in messages]
        self.template = chat_template(tokenizer, tools) or _WITHOUT_TEMPLATE
        self.whole = self._render(self.messages)
        said = json.dumps([self.messages, list(tools)], ensure_ascii=False)
        if _OPEN in said + self.whole or _CLOSE in said + self.whole:
            raise UserError("U+10FFFE and U+10FFFF are no characters of a text")
        self.words = _Words(_searched(self.template), said + self.whole)
        self.marked = [self.words.message(m, i) for i, m in enumerate(self.messages)]
        marked_tools = self.words.tools(tools)
        source = _with_marks(self.template)
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

    def _extend_left(self, leaf: _Leaf, start: int) -> int:
        """`start`, moved before the signs and blanks that an answer begins with."""
        head = leaf.head
        reach = self.whole[max(0, start - 2 * len(head) - 64) : start]
        found = re.search(r"\s*".join(map(re.escape, _solid(head))) + r"\s*\Z", reach)
        if _solid(head) and found:
            start -= len(reach) - found.start()
        return start - self._shown_blanks(leaf, left=True)

    def _extend_right(self, leaf: _Leaf, stop: int) -> int:
        """`stop`, moved behind the signs and blanks that an answer ends with."""
        tail = leaf.tail
        reach = self.whole[stop : stop + 2 * len(tail) + 64]
        found = re.match(r"\s*" + r"\s*".join(map(re.escape, _solid(tail))), reach)
        if _solid(tail) and found:
            stop += found.end()
        return stop + self._shown_blanks(leaf, left=False)

    def _shown_blanks(self, leaf: _Leaf, *, left: bool) -> int:
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
            ends = [m for m in re.finditer(r"\S+", closing)]
            return [(start, stop + (ends[-1].end() if ends else 0))]
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
            behind = stop - self._last(index, self.places) + self._last(index, places)
        except ValueError:  # the template refuses this beginning, or shows no word of it
            return rest
        same = zip(rest, alone[behind:], strict=False)
        return "".join(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], same))

    def _last(self, index: int, places: dict[str, list[Span]]) -> int:
        """Where the last word of an answer ends."""
        codes = (c for leaf in self.words.leaves if leaf.index == index for c in leaf.codes)
        return max(places[code][0][1] for code in codes if code in places)


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

"""Which word of a rendered conversation comes from which message.

Every word is replaced by a private character of its own. What a template makes of that says where each
word of the real text stands, however the template trims, moves or surrounds it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from mqat.data.messages import REASONING, Message
from mqat.errors import UserError

# Planes 15 and 16 are for private use; the last two characters stand around what a template marks.
_PRIVATE = re.compile("[\U000f0000-\U0010ffff]")
OPEN, CLOSE = "\U0010fffe", "\U0010ffff"
# trim_blocks, which transformers sets, removes the line end.
_MARKING = f"{{% macro mqat_answer() %}}{OPEN}{{{{ caller() }}}}{CLOSE}{{% endmacro %}}\n"
Span = tuple[int, int]


@lru_cache(maxsize=64)
def with_marks(template: str) -> str | None:
    """The template whose `{% generation %}` blocks write `OPEN` and `CLOSE`; None: it has none.

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
def searched(template: str) -> re.Pattern[str]:
    """Matches what a template may look for inside messages (`'</think>' in content`), or else a word."""
    from jinja2 import Environment, nodes

    tree = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(
        with_marks(template) or template
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


@dataclass
class Leaf:
    """One text of a message, its words as private characters, and what stands before and after them."""

    index: int
    kind: str
    text: str
    codes: list[str] = field(default_factory=list)
    head: str = ""
    tail: str = ""


class Words:
    """Replaces the words of messages by private characters and finds them again."""

    def __init__(self, pattern: re.Pattern[str], taken: str) -> None:
        used = set(_PRIVATE.findall(taken))
        self._free = (c for c in map(chr, range(0xF0000, 0x10FFFE)) if c not in used)
        self._pattern = pattern
        self.originals: dict[str, str] = {}
        self.leaves: list[Leaf] = []

    def unused(self) -> str:
        """A private character that stands for nothing yet."""
        code = next(self._free, None)
        if code is None:
            raise UserError("a conversation of more than 131,000 words is too long; split it")
        return code

    def _code(self, leaf: Leaf, word: str) -> str:
        code = self.unused()
        self.originals[code] = word
        leaf.codes.append(code)
        return code

    def text(self, text: str, index: int, kind: str) -> str:
        """A text of message `index` with its words replaced; it becomes a leaf."""
        leaf = Leaf(index, kind, text)
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
        """A message whose content, reasoning, name and calls have their words replaced."""
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
            if code not in self.originals and code not in (OPEN, CLOSE):
                continue
            pieces.append(marked[last : match.start()])
            position += match.start() - last
            last = match.end()
            if code == OPEN:
                opened.append(position)
            elif code == CLOSE:
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

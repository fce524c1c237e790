"""Plain prose from the wikitext source of an encyclopedia article.

Templates that carry words or numbers of the sentence (`{{convert|5|km}}`) are rendered, all others
are removed. A paragraph with something that has no plain form, such as a formula, is left out as a
whole: a sentence with a hole in it would teach a language model wrong grammar.
"""

import html
import re

_HOLE = "\x00"  # marks a paragraph that cannot be rendered

_INVISIBLE = re.compile(
    r"<!--.*?-->|<ref\b[^<>]*/>|<ref\b[^<>]*>.*?</ref>|__[A-Z]+__|[\u200b-\u200f\ufeff]", re.DOTALL
)
_BLOCKS = re.compile(
    r"<(gallery|source|syntaxhighlight|timeline|table|pre|imagemap)\b.*?</\1>",
    re.DOTALL | re.IGNORECASE,
)
_MATH = re.compile(r"<math\b.*?</math>", re.DOTALL)
_EXTERNAL_LINK = re.compile(r"\[(?:https?:)?//[^\s\]]+ *([^\]]*)\]")
_LINK = re.compile(r"\[\[((?:[^\[\]]|\[(?!\[)|\](?!\]))*)\]\]")
_NOT_TEXT = re.compile(r"(?:file|image|category|media):", re.IGNORECASE)
_INTERLANGUAGE = re.compile(r"[a-z-]{2,12}:[^|]*$")
_TEMPLATE = re.compile(r"\{\{((?:[^{}]|\{(?!\{)|\}(?!\}))*)\}\}")
_NAMED_ARGUMENT = re.compile(r"\s*([\w -]+?)\s*=(.*)", re.DOTALL)
_TABLE = re.compile(r"\{\|(?:(?!\{\|).)*?\|\}", re.DOTALL)
_SUPERSCRIPT = re.compile(r"<sup>\s*([0-9+\u2212-]+)\s*</sup>")
_SUPERSCRIPT_DIGITS = str.maketrans("0123456789+-\u2212", "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁻")
_LINE_BREAK = re.compile(r"<br\b[^<>]*>|</?(?:blockquote|poem|div|center|li|ol|ul|p|hr)\b[^<>]*>")
_TAG = re.compile(r"</?[a-zA-Z][^<>]*>")
_HEADING = re.compile(r"(=+)\s*(.*?)\s*=+$")
_LIST_ITEM = re.compile(r"[*#:;]+\s*")
_TABLE_REMAINS = re.compile(r"[|!{}]")
_MARKUP_REMAINS = re.compile(r"\{\{|\}\}|\[\[|\]\]")
_APPENDICES = frozenset(
    "references,external links,see also,further reading,notes,footnotes,bibliography,sources,"
    "citations,works cited,gallery,notes and references,references and notes".split(",")
)
_MIN_LIST_WORDS = 12  # shorter items are enumerations, not sentences

_TIDY = (
    (re.compile(r"(?<=\w)'''s\b"), "'s"),  # possessive after italics
    (re.compile(r"'{2,}"), ""),
    (re.compile(r"[ \t\u00a0\u2009\u202f]+"), " "),
    # What removed pronunciations leave behind: "(; , Akhilleus, )".
    (re.compile(r"\(([\s,;:/]|or\b)+"), "("),
    (re.compile(r"[\s,;:/]+\)"), ")"),
    (re.compile(r" ?\(\)"), ""),
    (re.compile(r" +([,.;:!?)])(?!\w)"), r"\1"),
    (re.compile(r"([,;])(?: ?[,;])+"), r"\1"),
    (re.compile(r"[,;]\."), "."),
)

_FIRST_ARGUMENT = frozenset(
    "nowrap,nobr,small,smaller,big,sc,smallcaps,abbr,tooltip,vr,flag,flagcountry,keypress,key,"
    "nihongo,ipa,vanchor,quote,blockquote,quotation,cquote,lang-en,nts,visible anchor,"
    "italics correction,unicode,pslink,ship,mvar,var,math text,em,strong".split(",")
)
_LAST_ARGUMENT = frozenset({"lang", "transl", "transliteration"})
_LITERAL = {
    "nbsp": " ",
    "spaces": " ",
    "·": " · ",
    "'s": "'s",
    "'": "'",
    "ndash": "–",  # noqa: RUF001
    "spaced ndash": " – ",  # noqa: RUF001
    "snd": " – ",  # noqa: RUF001
    "mdash": "—",
    "!": "|",
    "=": "=",
}
_NO_PLAIN_FORM = frozenset({"math", "inflation", "age", "cuneiform", "music", "bartable"})
_RANGE_WORDS = {word: word for word in ("to", "and", "or", "by")}
_RANGE_WORDS |= {"x": "by", "-": "to", "–": "to"}  # noqa: RUF001
_UNITS = {"sqmi": "square miles", "km2": "km²", "m2": "m²", "m3": "m³", "C": "°C", "F": "°F"}
_UNITS |= {"sqkm": "km²", "acre": "acres", "mi": "miles", "ft": "feet", "in": "inches"}
_UNITS |= {"lb": "pounds"}


def _convert(arguments: list[str]) -> str:
    """`{{convert|5|to|10|km}}` -> "5 to 10 km": the author's own number and unit."""
    words = arguments[:1]
    rest = arguments[1:]
    while len(rest) >= 2 and rest[0] in _RANGE_WORDS:
        words += [_RANGE_WORDS[rest[0]], rest[1]]
        rest = rest[2:]
    if not rest or not words[0][:1].isdigit():
        return _HOLE
    return " ".join([*words, _UNITS.get(rest[0], rest[0])])


def _fraction(arguments: list[str]) -> str:
    if len(arguments) == 3:
        return f"{arguments[0]} {arguments[1]}/{arguments[2]}"
    return "/".join(arguments if len(arguments) == 2 else ["1", *arguments])


def _render_template(match: re.Match[str]) -> str:
    name, *parts = match[1].split("|")
    name = name.strip().lower().replace("_", " ")
    named: dict[str, str] = {}
    arguments: list[str] = []
    for part in parts:
        pair = _NAMED_ARGUMENT.fullmatch(part)
        if pair and not pair[1].isdigit():
            named[pair[1].lower()] = pair[2].strip()
        else:
            arguments.append((pair[2] if pair else part).strip())
    if name in _LITERAL:
        return _LITERAL[name]
    if name in _NO_PLAIN_FORM:
        return _HOLE
    if name == "as of" and arguments:
        return f"{'as' if 'lc' in named else 'As'} of {arguments[0]}"
    if name in _FIRST_ARGUMENT:
        return next(iter(arguments), named.get("text", ""))
    if not arguments:
        return ""
    if name in _LAST_ARGUMENT:
        return arguments[-1]
    if name in ("convert", "cvt"):
        return _convert(arguments)
    if name in ("frac", "fraction", "sfrac"):
        return _fraction(arguments)
    if name in ("circa", "c."):
        return f"c. {arguments[0]}"
    if name == "angbr":
        return f"⟨{arguments[0]}⟩"
    if name == "val":
        return arguments[0]
    if name == "chem":
        return "".join(arguments)
    if name.startswith("simplenuclide"):
        return "-".join(arguments[:2])
    return ""


def _render_link(match: re.Match[str]) -> str:
    target = match[1].strip()
    if _NOT_TEXT.match(target) or _INTERLANGUAGE.match(target):
        return ""
    return target.lstrip(":").rsplit("|", 1)[-1]


def _until_stable(pattern: re.Pattern[str], replace: object, text: str) -> str:
    """Substitutes from the innermost match outwards."""
    count = 1
    while count:
        text, count = pattern.subn(replace, text)  # type: ignore[call-overload]
    return text


def _inline(text: str) -> str:
    """Everything but headings, lists and paragraphs."""
    text = _BLOCKS.sub("", _INVISIBLE.sub("", text))
    text = _MATH.sub(_HOLE, text)
    text = _EXTERNAL_LINK.sub(r"\1", text)
    # Links before templates: a pipe inside a link does not separate template arguments.
    text = _until_stable(_LINK, _render_link, text)
    text = _until_stable(_TEMPLATE, _render_template, text)
    text = _until_stable(_TABLE, "", text)
    text = _SUPERSCRIPT.sub(lambda match: match[1].translate(_SUPERSCRIPT_DIGITS), text)
    text = _TAG.sub("", _LINE_BREAK.sub("\n", text))
    # Twice-escaped text (`&amp;lt;`) is literal, so it is resolved only after the tags are gone.
    return html.unescape(text)


def _tidy(line: str) -> str:
    for pattern, replacement in _TIDY:
        line = pattern.sub(replacement, line)
    return line.strip()


def clean_wikitext(source: str) -> str:
    """Title-less plain text of an article: prose paragraphs under their headings.

    Args:
        source: Wikitext as in the `<text>` element of a dump, its XML escapes resolved.
    """
    kept: list[str] = []
    heading: str | None = None  # written only once a paragraph follows it
    skipped_level = 0  # of the appendix that is being left out; 0: none
    for line in _inline(source).split("\n"):
        line = line.strip()
        match = _HEADING.fullmatch(line)
        if match:
            level, heading = len(match[1]), _tidy(match[2])
            if skipped_level == 0 or level <= skipped_level:
                skipped_level = level if heading.lower() in _APPENDICES else 0
            continue
        if not line or skipped_level or _HOLE in line or _TABLE_REMAINS.match(line):
            continue
        item = _LIST_ITEM.match(line)
        text = _tidy(line[item.end() :] if item else line)
        is_enumeration = item is not None and len(text.split()) < _MIN_LIST_WORDS
        if not text or is_enumeration or _MARKUP_REMAINS.search(text):
            continue
        if heading:
            kept.append(heading)
            heading = None
        kept.append(text)
    return "\n\n".join(kept)

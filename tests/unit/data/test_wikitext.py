from __future__ import annotations

import pytest

from mqat.data.wikitext import clean_wikitext


@pytest.mark.parametrize(
    ("source", "plain"),
    [
        ("The [[dog|dogs]] of [[Rome]].", "The dogs of Rome."),
        ("''Iliad'''s '''hero'''.", "Iliad's hero."),
        ("One.<ref>{{cite|title=A}}</ref> Two.<ref name=\"a/b\" /> Three.", "One. Two. Three."),
        ("It is {{convert|5|to|10|km}} away.", "It is 5 to 10 km away."),
        ("A {{frac|3|1|2}} {{nowrap|[[inch|in]]}} pipe.", "A 3 1/2 in pipe."),
        ("10<sup>6</sup> molecules of H<sub>2</sub>O, 19<sup>th</sup>.",
         "10⁶ molecules of H2O, 19th."),
        ("Achilles ({{IPAc-en|ə}}; {{lang-el|Ἀ}}, ''Akhilleus'', {{x}}) fought.",
         "Achilles (Akhilleus) fought."),
        ("Word ({{lang|grc|ἀναρχία}}).", "Word (ἀναρχία)."),
        ("See [http://example.org the site].<!-- [[not]] -->", "See the site."),
        ("A[[File:x.jpg|thumb|A [[cat]] [sic] {{small|there}}]]B.", "AB."),
        ("[[de:Hund]] [[Category:Dogs]]Dogs bark.", "Dogs bark."),
        ("{{Infobox|a={{small|b}}|c={|d}}Dogs bark.", "Dogs bark."),
        ("{|\n| a\n{|\n| nested\n|}\n|}\nDogs bark.", "Dogs bark."),
        ("Tom &amp; Jerry wrote &lt;b&gt;.", "Tom & Jerry wrote <b>."),
    ],
)  # fmt: skip
def test_markup_becomes_the_text_a_reader_sees(source: str, plain: str) -> None:
    assert clean_wikitext(source) == plain


def test_a_paragraph_with_a_formula_is_left_out_whole() -> None:
    assert clean_wikitext("Energy is <math>E</math> here.\n\nMass stays.") == "Mass stays."


def test_a_reference_that_closes_itself_does_not_swallow_text_up_to_the_next_one() -> None:
    assert clean_wikitext('a<ref name="http://x/y"/> kept <ref>gone</ref>b') == "a kept b"


def test_headings_stay_only_above_text_and_appendices_disappear() -> None:
    source = (
        "Lead.\n== Early life ==\n=== Birth ===\nBorn.\n== Empty ==\n== See also ==\n* [[A]]\n"
        "=== Books ===\nTitle, 1900.\n== Legacy ==\nGreat.\n== References ==\nx"
    )
    assert clean_wikitext(source) == "Lead.\n\nBirth\n\nBorn.\n\nLegacy\n\nGreat."


def test_enumerations_go_and_sentences_in_lists_stay() -> None:
    sentence = "this item is a full sentence with a good dozen of words in it."
    assert clean_wikitext(f"* [[Apple]]\n* {sentence}") == sentence

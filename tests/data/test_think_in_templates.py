"""Chat templates that write think tokens themselves: x, what a trace follows, and the export."""

import logging

import pytest

from nrt_jax.data.bad_rows import BadRow
from nrt_jax.data.chat_export import chat_template_text
from nrt_jax.data.row_tokens import RowTokenizer
from nrt_jax.data.show import show_rows
from nrt_jax.data.sources import Row
from nrt_jax.data.tokenizer import Tokenizer
from nrt_jax.errors import InputError
from nrt_jax.types import TokenizedExample
from tests.data.templates import QWEN3, R1, TEMPLATES
from tests.data.test_chat_export import ANSWER, CHATS, apply

transformers = pytest.importorskip("transformers")

THINK = ("<think>", "</think>")
OPENS = "{% if add_generation_prompt %}{{ '<think>' }}{% endif %}"
# Only a conversation that begins with a system turn is opened.
SOMETIMES = (
    "{% for message in messages %}{{ message.role }} {{ message.content }}\n{% endfor %}next: "
    "{% if add_generation_prompt and messages[0].role == 'system' %}{{ '<think>\n \n' }}{% endif %}"
)
WRITTEN = {
    **TEMPLATES,
    "r1": R1,
    "qwen3": QWEN3,
    "opens": TEMPLATES["llama3"] + OPENS,
    "sometimes": SOMETIMES,
}
TODAY = "{{ strftime_now('%d %b %Y') }} {{ messages[0].content }}"


@pytest.fixture
def rows(made_directory, tmp_path, request, config):
    """The rows of a template's text, or of a named template, with <think> and </think>."""

    def make(text: str, kind: str = "llama3", **values) -> tuple[RowTokenizer, Tokenizer, object]:
        if kind == "mistral":
            tokenizer = request.getfixturevalue("mistral")
            text = text.replace(THINK[0], "[control_12]").replace(THINK[1], "[control_13]")
        else:
            tokenizer = Tokenizer.load(made_directory(kind), *THINK)
        if text not in ("plain", "tulu"):
            values["template_file"] = tmp_path / "template.jinja"
            values["template_file"].write_text(text)
            text = "tokenizer"
        run = config(text, **values)
        return RowTokenizer(run, tokenizer), tokenizer, run

    return make


def tokenized(rows: RowTokenizer, fields: dict) -> TokenizedExample | BadRow:
    ((_, row),) = rows.of_rows([Row(0, "line 1", fields)])
    return row


def example(rows: RowTokenizer, chat: list) -> TokenizedExample:
    row = tokenized(rows, {"messages": [*chat, ANSWER]})
    assert isinstance(row, TokenizedExample), row
    return row


# --- the trained prompt, the served one and that of transformers ---------------------------------


@pytest.mark.parametrize(
    ("kind", "name", "add_bos"),
    [
        *(("llama3", name, True) for name in ("plain", "tulu", *WRITTEN)),
        *(("first", name, False) for name in ("plain", "r1", "qwen3", "sometimes")),
        *(("mistral", name, True) for name in ("plain", "mistral", "r1", "sometimes")),
    ],
)
def test_one_t_start_for_all(kind, name, add_bos, rows, config, tmp_path):
    """In training, in serving, in transformers, and in a training on from the export."""
    trained, tokenizer, run = rows(WRITTEN.get(name, name), kind, add_bos=add_bos)
    start = tokenizer.think_start_id
    theirs, again = {}, {}
    for opens in (True, False):
        folder = tmp_path / f"export_{opens}"
        tokenizer.copy_to(folder, chat_template_text(run, tokenizer, opens_trace=opens))
        theirs[opens] = transformers.AutoTokenizer.from_pretrained(folder)
        names = map(tokenizer.token, (start, tokenizer.think_end_id))
        own = Tokenizer.load(folder, *names)
        again[opens] = RowTokenizer(config("tokenizer", add_bos=add_bos), own)
    for chat in CHATS if name != "plain" else CHATS[:2]:
        row = example(trained, chat) if name != "plain" else plain(trained, chat)
        opened = row.trace_prompt(start).tolist()
        assert opened.count(start) == 1
        assert apply(theirs[True], chat) == opened
        assert apply(theirs[False], chat) == row.prompt_tokens.tolist()
        assert trained.of_messages(chat, opened=True).tolist() == opened
        assert trained.of_messages(chat).tolist() == row.prompt_tokens.tolist()
        for more in again.values():
            assert example(more, chat).prompt_tokens.tolist() == row.prompt_tokens.tolist()
        assert again[True].of_messages(chat, opened=True).tolist() == opened
        whole = apply(theirs[True], [*chat, ANSWER], add_generation_prompt=False)
        assert start not in whole or name in ("sometimes", "qwen3")


def plain(rows: RowTokenizer, chat: list) -> TokenizedExample:
    row = tokenized(rows, {"question": chat[0]["content"], "answer": "3"})
    assert isinstance(row, TokenizedExample), row
    return row


def test_the_template_of_llama_that_opens(llama_directory, llama_reference, config, tmp_path):
    """A real tokenizer, whose reserved tokens take the names, with its own template."""
    tokenizer = Tokenizer.load(llama_directory, *THINK)
    path = tmp_path / "template.jinja"
    path.write_text(tokenizer.fast.get_chat_template() + OPENS.replace("<think>", "<think>\\n"))
    run = config("tokenizer", template_file=path)
    tokenizer.copy_to(tmp_path / "nrt", chat_template_text(run, tokenizer, opens_trace=True))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "nrt")
    trained = RowTokenizer(run, tokenizer)
    for chat in CHATS:
        row = example(trained, chat)
        assert row.prompt_tokens.tolist() == apply(llama_reference, chat)
        assert tokenizer.decode(row.after_start_tokens) == "\n"
        assert apply(theirs, chat) == row.trace_prompt(tokenizer.think_start_id).tolist()


def test_the_white_space_after_t_start_is_the_templates(rows):
    trained, tokenizer, _ = rows(R1)
    row = example(trained, CHATS[0])
    assert tokenizer.decode(row.prompt_tokens) == "<|begin_of_text|><|User|>1+2?<|Assistant|>"
    assert tokenizer.decode(row.after_start_tokens) == "\n"
    assert row.example.question == "<|User|>1+2?<|Assistant|>"
    exact, _, _ = rows(WRITTEN["opens"])
    assert example(exact, CHATS[0]).after_start_tokens.tolist() == []


def test_the_export_has_the_date_of_the_training(rows, tmp_path):
    trained, tokenizer, run = rows(TODAY)
    tokenizer.copy_to(tmp_path / "nrt", chat_template_text(run, tokenizer, opens_trace=True))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "nrt")
    opened = trained.of_messages(CHATS[0], opened=True).tolist()
    assert tokenizer.decode(opened) == "<|begin_of_text|>26 Jul 2024 1+2?<think>"
    assert apply(theirs, CHATS[0]) == opened


def test_t_start_and_its_space_count_as_the_prompts_length(rows):
    trained, _, _ = rows(R1)
    longest = len(example(trained, CHATS[0]).prompt_tokens) + 1
    assert example(rows(R1, max_prompt_tokens=longest)[0], CHATS[0])
    row = tokenized(rows(R1, max_prompt_tokens=longest - 1)[0], {"messages": [*CHATS[0], ANSWER]})
    assert isinstance(row, BadRow)
    assert row.reason == "prompt too long"


def test_rows_show_what_the_template_writes(rows):
    _, tokenizer, run = rows(R1)
    shown = "\n".join(show_rows(run, tokenizer, reasons=True, rows=1, color=False))
    assert f"t_start      2  [<think>⟨{tokenizer.think_start_id}⟩↵]" in shown
    assert shown.count("<think>") == 1


def test_a_prompt_without_thinking_stays_one(rows, tmp_path):
    """The empty trace that a client of the export asks for is not opened again."""
    _, tokenizer, run = rows(QWEN3)
    tokenizer.copy_to(tmp_path / "nrt", chat_template_text(run, tokenizer, opens_trace=True))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "nrt")
    ids = apply(theirs, CHATS[0], enable_thinking=False)
    assert tokenizer.decode(ids).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")


# --- think tokens elsewhere ----------------------------------------------------------------------

ELSEWHERE = {
    "an empty trace": QWEN3.replace(
        "enable_thinking is defined and enable_thinking is false", "true"
    ),
    "words in the trace": R1.replace("<think>\\n", "<think>\\nOkay, "),
    "two": R1.replace("<think>\\n", "<think><think>\\n"),
    "in front": "<think>{{ messages[0].content }}",
    "the end alone": "{{ messages[0].content }}</think>",
}


@pytest.mark.parametrize("name", ELSEWHERE)
def test_a_template_that_writes_them_elsewhere(name, rows, tmp_path):
    end = name in ("the end alone",)
    with pytest.raises(InputError) as caught:
        rows(ELSEWHERE[name])
    assert str(caught.value) == (
        f"{tmp_path / 'template.jinja'}: the chat template writes {THINK[end]} into the prompt, "
        "where <think> may stand at the end and nowhere else; set data.template_file to a copy of "
        "the template without it, or data.think_start and data.think_end to tokens that the "
        "template does not write"
    )


def test_a_template_that_writes_them_into_some_rows(rows):
    """Qwen3 writes an empty trace into an answer that no question follows."""
    trained, _, _ = rows(QWEN3)
    row = tokenized(trained, {"messages": [*CHATS[0], ANSWER, ANSWER]})
    assert isinstance(row, BadRow)
    assert row.reason == "think token in the prompt"


@pytest.mark.parametrize("text", ["{{ '<think>' }}", "{{ '' }}"])
def test_a_template_that_writes_nothing_else(text, rows):
    trained, _, _ = rows(text, add_bos=False)
    row = tokenized(trained, {"messages": [*CHATS[0], ANSWER]})
    assert isinstance(row, BadRow)
    assert row.reason == "empty prompt"


def test_names_that_are_not_those_of_the_template(made, config, tmp_path, caplog):
    path = tmp_path / "template.jinja"
    path.write_text(R1)
    with caplog.at_level(logging.WARNING, "nrt_jax"):
        RowTokenizer(config("tokenizer", template_file=path), made("llama3"))
    assert caplog.messages == [
        f"{path}: ends a prompt with <think>, which is not data.think_start=<|think_start|>; to "
        "reason with the tokens of the template, set data.think_start and data.think_end to them"
    ]


# --- their names in the turns --------------------------------------------------------------------


@pytest.mark.parametrize("text", ["<think>", "a</think>b", "<think>\n", " 1+2 <think>"])
@pytest.mark.parametrize("template", [R1, QWEN3, "tulu"])
def test_a_user_may_write_their_names(template, text, rows):
    trained, tokenizer, _ = rows(template)
    chat = [{"role": "user", "content": text}]
    row = example(trained, chat)
    assert tokenizer.think_start_id not in row.prompt_tokens
    assert tokenizer.think_end_id not in row.prompt_tokens
    assert text in tokenizer.decode(row.prompt_tokens)


REASONED = "<think>\nTwo and one.\n</think>\n\n3"


@pytest.mark.parametrize("template", [R1, QWEN3])
def test_reasoning_of_earlier_answers_is_dropped_as_the_template_does(template, rows, tmp_path):
    trained, tokenizer, run = rows(template)
    tokenizer.copy_to(tmp_path / "nrt", chat_template_text(run, tokenizer, opens_trace=True))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "nrt")
    chat = [CHATS[0][0], {"role": "assistant", "content": REASONED}, CHATS[0][0]]
    opened = example(trained, chat).trace_prompt(tokenizer.think_start_id)
    assert "Two and one" not in tokenizer.decode(opened)
    assert apply(theirs, chat) == opened.tolist()


def test_a_template_that_keeps_them_has_them_as_characters(rows):
    trained, tokenizer, _ = rows("tulu")
    chat = [CHATS[0][0], {"role": "assistant", "content": REASONED}, CHATS[0][0]]
    prompt = example(trained, chat).prompt_tokens
    assert REASONED in tokenizer.decode(prompt)
    assert tokenizer.think_end_id not in prompt

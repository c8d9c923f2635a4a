"""The exported chat template gives, in transformers, the ids of training: by ids, not by text."""

from importlib import resources

import pytest

from nrt_jax.data.chat_export import chat_template_text
from nrt_jax.data.row_tokens import RowTokenizer
from nrt_jax.data.sources import Row
from nrt_jax.data.tokenizer import Tokenizer
from nrt_jax.errors import InputError
from nrt_jax.types import TokenizedExample
from tests.data.made_tokenizers import KINDS, MULTILINGUAL
from tests.data.templates import MISTRAL, TEMPLATES

transformers = pytest.importorskip("transformers")

ANSWER = {"role": "assistant", "content": "3"}
CHATS = [
    [{"role": "user", "content": "1+2?"}],
    [{"role": "user", "content": " \n a  b\n"}],
    [{"role": "system", "content": " Be brief. "}, {"role": "user", "content": "1+2?"}],
    [{"role": "user", "content": "Hi"}, ANSWER, {"role": "user", "content": "1+2?"}],
    [
        {"role": "system", "content": ""},
        {"role": "user", "content": "Hi"},
        ANSWER,
        {"role": "user", "content": "1+2?"},
    ],
]


def exported(run, tokenizer, directory, *, opens_trace: bool):
    """AutoTokenizer of an export."""
    tokenizer.copy_to(directory, chat_template_text(run, tokenizer, opens_trace))
    return transformers.AutoTokenizer.from_pretrained(directory)


def x(fields: dict, run, tokenizer) -> list[int]:
    ((_, row),) = RowTokenizer(run, tokenizer).of_rows([Row(0, "line 1", fields)])
    assert isinstance(row, TokenizedExample), row
    return row.prompt_tokens.tolist()


def apply(reference, chat, **options) -> list[int]:
    options = {"add_generation_prompt": True, "return_dict": False, **options}
    return reference.apply_chat_template(chat, **options)


@pytest.mark.parametrize("add_bos", [True, False])
@pytest.mark.parametrize("template", ["tulu", *TEMPLATES])
@pytest.mark.parametrize("kind", [*KINDS, "mistral"])
def test_chats(kind, template, add_bos, load, config, tmp_path):
    tokenizer, _ = load(kind)
    run = config(template, add_bos=add_bos)
    plain = exported(run, tokenizer, tmp_path / "sft", opens_trace=False)
    opening = exported(run, tokenizer, tmp_path / "nrt", opens_trace=True)
    for chat in CHATS:
        ids = x({"messages": [*chat, ANSWER]}, run, tokenizer)
        assert ids.count(tokenizer.bos_id) == int(add_bos)
        assert apply(plain, chat) == ids
        assert apply(opening, chat) == [*ids, tokenizer.think_start_id]
        # Without the prompt to come there is no trace to open.
        whole = apply(opening, [*chat, ANSWER], add_generation_prompt=False)
        assert tokenizer.think_start_id not in whole
        assert whole == apply(plain, [*chat, ANSWER], add_generation_prompt=False)


@pytest.mark.parametrize("add_bos", [True, False])
@pytest.mark.parametrize("kind", [*KINDS, "mistral"])
def test_plain(kind, add_bos, load, config, tmp_path):
    tokenizer, _ = load(kind)
    run = config("plain", add_bos=add_bos)
    plain = exported(run, tokenizer, tmp_path / "sft", opens_trace=False)
    opening = exported(run, tokenizer, tmp_path / "nrt", opens_trace=True)
    for question in [*MULTILINGUAL, " 1+2", "\n1", "▁1", "▁▁ 1 "]:
        ids = x({"question": question, "answer": "3"}, run, tokenizer)
        chat = [{"role": "user", "content": question}]
        assert apply(plain, chat) == ids
        assert apply(opening, chat) == [*ids, tokenizer.think_start_id]


@pytest.mark.slow
def test_the_template_of_llama(load, config, tmp_path):
    """As its directory has it, and as transformers applies that without us."""
    tokenizer, reference = load("llama")
    run = config("tokenizer")
    opening = exported(run, tokenizer, tmp_path, opens_trace=True)
    for chat in CHATS:
        ids = x({"messages": [*chat, ANSWER]}, run, tokenizer)
        assert ids == apply(reference, chat)
        assert apply(opening, chat) == [*ids, tokenizer.think_start_id]


def test_the_quickstart(tokenizer, config, tmp_path):
    run = config("plain")
    reference = exported(run, tokenizer, tmp_path, opens_trace=True)
    ids = x({"question": "1+2", "answer": "3"}, run, tokenizer)
    chat = [{"role": "user", "content": "1+2"}]
    assert apply(reference, chat) == [*ids, tokenizer.think_start_id]


def test_a_tokenizer_without_bos(made_directory, config, tmp_path):
    source = tmp_path / "source"
    Tokenizer.load(made_directory("llama3")).copy_to(source)
    path = source / "tokenizer_config.json"
    path.write_text(path.read_text().replace('"bos_token"', '"sep_token"'))
    tokenizer = Tokenizer.load(source)
    assert tokenizer.bos_id is None
    for template in ("plain", "tulu", "chat"):
        run = config(template)
        reference = exported(run, tokenizer, tmp_path / template, opens_trace=True)
        ids = x({"question": "1+2", "answer": "3"}, run, tokenizer)
        chat = [{"role": "user", "content": "1+2"}]
        assert apply(reference, chat) == [*ids, tokenizer.think_start_id]


def test_a_template_that_is_right_is_kept(load, config):
    tokenizer, _ = load("prepend")
    assert chat_template_text(config("mistral"), tokenizer, opens_trace=False) == MISTRAL
    tulu = resources.files("nrt_jax.data").joinpath("tulu.jinja").read_text("utf-8")
    assert chat_template_text(config("tulu"), tokenizer, opens_trace=False) == tulu.rstrip("\n")
    assert chat_template_text(config("mistral"), tokenizer, opens_trace=True) == (
        MISTRAL + """{%+ if add_generation_prompt %}{{ "<|think_start|>" }}{% endif %}"""
    )


def test_a_template_that_takes_no_conversation(load, config, tmp_path):
    path = tmp_path / "t.jinja"
    path.write_text("{{ raise_exception('never') }}")
    tokenizer, _ = load("prepend")
    with pytest.raises(InputError) as caught:
        chat_template_text(config("tulu", template_file=path), tokenizer, opens_trace=True)
    assert str(caught.value) == (
        f"{path}: the chat template refuses the row: never, here one turn of a user; set another"
    )

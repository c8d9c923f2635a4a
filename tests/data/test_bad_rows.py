"""Every reason for which a row is refused, with its whole message."""

import json

import pytest
import tokenizers
from tokenizers import AddedToken, models

from nrt_jax.data.pipeline import load_dataset
from nrt_jax.data.tokenizer import Tokenizer
from nrt_jax.errors import InputError

GOOD = {"question": "1+2", "answer": "=3"}
GOOD_CHAT = {
    "messages": [{"role": "user", "content": "1+2"}, {"role": "assistant", "content": "=3"}]
}


def question(value):
    return {**GOOD, "question": value}


def answer(value):
    return {**GOOD, "answer": value}


PLAIN_CASES = {
    "bad JSON": (
        b'{"question": 1 2}',
        """'{"question": 1 2}' is not JSON (Expecting ',' delimiter: line 1 column 16 (char 15));"""
        " write one JSON object a line",
    ),
    "not UTF-8": (
        b'{"question": "\xff\xfe1234567"}',
        "has the bytes b'\\xff\\xfe123456'; save the file as UTF-8",
    ),
    "not an object": (b"[1, 2]", "[1, 2] is no JSON object; write {...}"),
    "without 'question'": (
        {"query": "1+2", "answer": "=3"},
        "field 'question' is missing (it has 'query', 'answer'); add it",
    ),
    "without 'answer'": (
        {"question": "1+2"},
        "field 'answer' is missing (it has 'question'); add it",
    ),
    "'question' not text": (question(["1+2"]), "'question' is ['1+2']; write it as a string"),
    "'answer' not text": (answer(True), "'answer' is True; write it as a string"),
    "empty 'question'": (question(""), "'question' is ''; fill it in or drop the row"),
    "empty 'answer'": (answer(" \n"), "'answer' is ' \\n'; fill it in or drop the row"),
    "'answer' not Unicode": (
        answer("=\ud83d3"),
        "'answer' has the lone surrogate '\\ud83d'; escape it as a pair",
    ),
    "prompt too long": (
        question("1+1+1+1+1"),
        "the prompt '1+1+1+1+1' has 10 tokens, more than data.max_prompt_tokens=9; "
        "raise it or shorten the row",
    ),
    "answer too long": (
        answer("=" * 100),
        f"the answer '{'=' * 56}... has 101 tokens, more than data.max_answer_tokens=5; "
        "raise it or shorten the row",
    ),
    "answer not in the vocabulary": (
        answer("=3a"),
        "the answer '=3a' has characters that the tokenizer cannot spell; "
        "use another tokenizer or drop the row",
    ),
}

USER = {"role": "user", "content": "1+2"}
CHAT_CASES = {
    "messages not a list": ("1+2", "'messages' is '1+2'; give a list of turns"),
    "no answered turn": (
        [{"role": "assistant", "content": "=3"}, USER],
        "'messages' has no assistant turn after another turn; give at least user, assistant",
    ),
    "bad turn": ([USER, "=3"], "'messages[1]' is '=3'; give {role, content}"),
    "bad role": (
        [USER, {"role": "bot", "content": "=3"}],
        "'messages[1].role' is 'bot'; use system, user, assistant",
    ),
    "without 'content'": (
        [USER, {"role": "assistant"}],
        "field 'messages[1].content' is missing (it has 'role'); add it",
    ),
    "empty 'content'": (
        [{"role": "user", "content": ""}, {"role": "assistant", "content": "=3"}],
        "'messages[0].content' is ''; fill it in or drop the row",
    ),
}


def refusal(config, tokenizer) -> str:
    with pytest.raises(InputError) as caught:
        load_dataset(config, tokenizer)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("reason", PLAIN_CASES)
def test_plain_rows(reason, make_config, write_rows, tokenizer):
    row, detail = PLAIN_CASES[reason]
    path = write_rows([GOOD, row, question("1+3")])
    limits = {"max_prompt_tokens": 9, "max_answer_tokens": 5, "eval_rows": 0}
    assert refusal(make_config(path=path, max_bad_share=0.3, **limits), tokenizer) == (
        f"{path}: 1 of 3 rows are unusable (1 {reason}), more than data.max_bad_share=0.3; "
        f"first line 2: {detail}"
    )
    dataset = load_dataset(make_config(path=path, max_bad_share=0.34, **limits), tokenizer)
    assert dataset.bad_rows == {reason: 1}
    assert [example.example.index for example in dataset.train] == [0, 2]


@pytest.mark.parametrize("reason", CHAT_CASES)
def test_chat_rows(reason, make_config, write_rows, tokenizer):
    messages, detail = CHAT_CASES[reason]
    path = write_rows([GOOD_CHAT, {"messages": messages}])
    config = make_config(path=path, template="tulu", eval_rows=0)
    assert refusal(config, tokenizer) == (
        f"{path}: 1 of 2 rows are unusable (1 {reason}), more than data.max_bad_share=0.01; "
        f"first line 2: {detail}"
    )


USER_AGAIN, ANSWER = {"role": "user", "content": "1+3"}, {"role": "assistant", "content": "=3"}


@pytest.mark.parametrize(
    ("turns", "reason", "detail"),
    [
        (
            [USER, ANSWER, USER_AGAIN],
            "last turn not the assistant's",
            "'messages' ends with a turn of the user; end it with the answer",
        ),
        (
            [USER, USER_AGAIN, ANSWER],
            "broken role order",
            "'messages[1]' is a turn of the user; let user and assistant take turns after one "
            "system turn or none",
        ),
    ],
)
def test_conversations_of_a_preset(turns, reason, detail, make_config, write_rows, tokenizer):
    path = write_rows([GOOD_CHAT, {"messages": turns}])
    settings = {"path": path, "template": "tulu", "preset": "messages", "eval_rows": 0}
    dataset = load_dataset(make_config(max_bad_share=0.5, **settings), tokenizer)
    (rejected,) = dataset.rejected
    assert (rejected.row, rejected.reason, rejected.detail) == ("line 2", reason, detail)
    assert f"(1 {reason}), more than data.max_bad_share=0.01; first line 2: {detail}" in refusal(
        make_config(**settings), tokenizer
    )


def test_text_that_spells_a_control_token(tmp_path, make_config, write_rows):
    pieces = [(name, 0.0) for name in ("<unk>", "</s>", "<t>", "</t>")]
    pieces += [(character, -5.0) for character in "12+=3<>/st"]
    backend = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=0))
    backend.add_special_tokens([AddedToken(name, normalized=False) for name, _ in pieces[:4]])
    directory = tmp_path / "unigram"
    directory.mkdir()
    backend.save(str(directory / "tokenizer.json"))
    settings = {"eos_token": "</s>", "unk_token": "<unk>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    unigram = Tokenizer.load(directory, "<t>", "</t>")
    path = write_rows([GOOD, question("1</t>2"), answer("=</s>3")])
    assert refusal(make_config(path=path, eval_rows=0), unigram) == (
        f"{path}: 2 of 3 rows are unusable (2 spells a control token), more than "
        "data.max_bad_share=0.01; first line 2: '1</t>2' spells </t>; reword the text"
    )


def test_the_first_bad_row_is_named_and_all_are_counted(make_config, write_rows, tokenizer):
    rows = [GOOD, answer("=" * 9), answer(""), answer(""), b"{"]
    path = write_rows(rows)
    assert refusal(make_config(path=path, max_answer_tokens=5, eval_rows=0), tokenizer) == (
        f"{path}: 4 of 5 rows are unusable (2 empty 'answer', 1 answer too long, 1 bad JSON), "
        "more than data.max_bad_share=0.01; first line 2: the answer '=========' has 10 tokens, "
        "more than data.max_answer_tokens=5; raise it or shorten the row"
    )


def test_deeply_nested_json_is_a_bad_row(make_config, write_rows, tokenizer):
    path = write_rows([GOOD, b"[" * 100_000])
    assert "1 bad JSON" in refusal(make_config(path=path, eval_rows=0), tokenizer)


def test_no_usable_row_at_all(make_config, write_rows, tokenizer):
    path = write_rows([answer("")])
    assert refusal(make_config(path=path, max_bad_share=1, eval_rows=0), tokenizer) == (
        f"{path}: 1 of 1 rows are unusable (1 empty 'answer'), none is left; "
        "first line 1: 'answer' is ''; fill it in or drop the row"
    )


def test_an_empty_file(make_config, write_rows, tokenizer):
    path = write_rows([b"", b"  "])
    assert refusal(make_config(path=path), tokenizer) == (
        f"{path}: holds no rows; give a file with at least one"
    )


def test_a_limit_is_kept_to_the_token(make_config, write_rows, tokenizer):
    path = write_rows([GOOD])
    load_dataset(
        make_config(path=path, max_prompt_tokens=4, max_answer_tokens=3, eval_rows=0), tokenizer
    )
    assert "prompt too long" in refusal(
        make_config(path=path, max_prompt_tokens=3, eval_rows=0), tokenizer
    )
    assert "answer too long" in refusal(
        make_config(path=path, max_answer_tokens=2, eval_rows=0), tokenizer
    )

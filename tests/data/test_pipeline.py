"""Datasets without overlap, and batches that resume where they were."""

import json
from itertools import chain, islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nrt_jax.data.batches import BatchIterator
from nrt_jax.data.pipeline import load_dataset
from nrt_jax.errors import InputError
from nrt_jax.types import Example, TokenizedExample


def numbered(count: int) -> list[TokenizedExample]:
    tokens = np.zeros(1, np.int32)
    return [TokenizedExample(Example(i, f"q{i}", "a"), tokens, tokens) for i in range(count)]


def indices(batches) -> list[list[int]]:
    return [[example.example.index for example in batch] for batch in batches]


def questions(examples) -> list[str]:
    return [example.example.question for example in examples]


def additions(count: int) -> list[dict]:
    return [
        {"question": f"{i // 10 % 10}+{i % 10}+{i // 100}", "answer": f"={i}"} for i in range(count)
    ]


# --- several right answers -----------------------------------------------------------------------


def test_the_first_of_several_answers_is_trained_on(make_config, tokenizer, write_rows):
    path = write_rows([{"question": "1+2", "answer": ["=3", "3", "=03"]}, *additions(2)])
    (row, one, _) = load_dataset(make_config(path=path, eval_rows=0), tokenizer).train
    assert (row.example.answer, row.example.aliases) == ("=3", ("3", "=03"))
    assert row.answer_tokens.tolist() == [*tokenizer.encode("=3"), tokenizer.eos_id]
    assert one.example.aliases == ()


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        ([], "'answer' is []; fill it in or drop the row"),
        (["=3", ""], "'answer[1]' is ''; fill it in or drop the row"),
        ([["=3"]], "'answer[0]' is ['=3']; write it as a string"),
        (["\ud83d"], "'answer[0]' has the lone surrogate '\\ud83d'; escape it as a pair"),
    ],
)
def test_answers_that_are_none(answers, said, make_config, tokenizer, write_rows):
    path = write_rows([{"question": "1+2", "answer": answers}])
    with pytest.raises(InputError) as caught:
        load_dataset(make_config(path=path, eval_rows=0), tokenizer)
    assert said in str(caught.value)


# --- batches -------------------------------------------------------------------------------------


# Grain's shuffle takes up to a millisecond a row where there are few rows.
@settings(max_examples=12, deadline=None)
@given(
    rows=st.integers(1, 40),
    batch_size=st.integers(1, 12),
    shuffle=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
    before=st.integers(0, 12),
)
def test_a_saved_position_continues_exactly(rows, batch_size, shuffle, seed, before):
    batch_size = min(batch_size, rows)
    iterator = BatchIterator(numbered(rows), batch_size, shuffle, seed)
    list(islice(iterator, before))
    saved = json.dumps(iterator.get_state())
    expected = indices(islice(iterator, 8))

    resumed = BatchIterator(numbered(rows), batch_size, shuffle, seed)
    next(resumed)  # wherever it stood before
    resumed.set_state(json.loads(saved))
    assert indices(islice(resumed, 8)) == expected
    iterator.set_state(json.loads(saved))
    assert indices(islice(iterator, 8)) == expected


@settings(max_examples=12, deadline=None)
@given(
    rows=st.integers(1, 20),
    batch_size=st.integers(1, 9),
    seed=st.integers(0, 2**32 - 1),
    stops=st.lists(st.integers(1, 9), min_size=1, max_size=3),
)
def test_every_epoch_has_every_row_once_across_restarts(rows, batch_size, seed, stops):
    batch_size = min(batch_size, rows)
    seen: list[int] = []
    state = None
    for batches in [*stops, 2 * rows // batch_size + 1]:
        iterator = BatchIterator(numbered(rows), batch_size, True, seed)
        if state is not None:
            iterator.set_state(state)
        taken = indices(islice(iterator, batches))
        assert all(len(batch) == batch_size for batch in taken)
        seen += chain.from_iterable(taken)
        state = json.loads(json.dumps(iterator.get_state()))
    for start in range(0, len(seen) - rows + 1, rows):
        assert sorted(seen[start : start + rows]) == list(range(rows))


def test_epochs_and_seeds_have_orders_of_their_own():
    def orders(seed):
        return indices(islice(BatchIterator(numbered(50), 50, True, seed), 2))

    first, second = orders(0)
    assert first != second
    assert first != sorted(first)
    assert orders(0) == [first, second]
    assert orders(1)[0] not in (first, second)


def test_without_shuffling_the_order_of_the_source_stays():
    batches = indices(islice(BatchIterator(numbered(5), 2, False, 0), 4))
    assert batches == [[0, 1], [2, 3], [4, 0], [1, 2]]


def test_fewer_rows_than_a_batch():
    with pytest.raises(InputError) as caught:
        BatchIterator(numbered(3), 4, True, 0)
    assert str(caught.value) == (
        "a batch of 4 prompts needs as many training rows, and the data has 3; "
        "lower the batch size or add rows"
    )


@pytest.mark.parametrize(
    ("rows", "batch_size", "shuffle", "seed", "difference"),
    [
        (9, 2, True, 0, ("rows", 8, 9)),
        (8, 4, True, 0, ("batch_size", 2, 4)),
        (8, 2, False, 0, ("shuffle", True, False)),
        (8, 2, True, 1, ("seed", 0, 1)),
    ],
)
def test_a_position_of_other_data_is_refused(rows, batch_size, shuffle, seed, difference):
    state = BatchIterator(numbered(8), 2, True, 0).get_state()
    name, saved, now = difference
    with pytest.raises(InputError) as caught:
        BatchIterator(numbered(rows), batch_size, shuffle, seed).set_state(state)
    assert str(caught.value) == (
        f"the saved data position has {name}={saved}, this run has {name}={now}; "
        "continue with the data and batch settings of the saved run"
    )


# --- files ---------------------------------------------------------------------------------------


def test_rows_become_tokens(make_config, write_rows, tokenizer):
    path = write_rows([{"question": "1+2", "answer": "=3"}])
    (example,) = load_dataset(make_config(path=path, eval_rows=0), tokenizer).train
    assert example.example == Example(0, "1+2", "=3")
    assert tokenizer.decode(example.prompt_tokens) == "<|bos|>1+2"
    assert tokenizer.decode(example.answer_tokens) == "=3<|eos|>"
    assert example.prompt_tokens.dtype == example.answer_tokens.dtype == np.int32
    bare = make_config(path=path, eval_rows=0, add_bos=False)
    assert tokenizer.decode(load_dataset(bare, tokenizer).train[0].prompt_tokens) == "1+2"


def test_the_question_of_a_chat_is_kept_for_readers(make_config, write_rows, tokenizer, tmp_path):
    """x of a chat begins with the template's text; samples are named by the last user turn."""
    template = tmp_path / "chat.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}\n{% endfor %}", encoding="utf-8")
    turns = [
        {"role": "user", "content": "1+1"},
        {"role": "assistant", "content": "=2"},
        {"role": "user", "content": "1+2"},
        {"role": "assistant", "content": "=3"},
    ]
    path = write_rows([{"messages": turns}, {"question": "0+4", "answer": "=4"}])
    chat = make_config(path=path, eval_rows=0, template="tokenizer", template_file=template)
    first, second = (row.example for row in load_dataset(chat, tokenizer).train)
    assert (first.question, first.user_text) == ("1+1\n=2\n1+2\n", "1+2")
    assert (second.question, second.user_text) == ("0+4\n", "0+4")
    path = write_rows([{"question": "0+4", "answer": "=4"}])
    (plain,) = load_dataset(make_config(path=path, eval_rows=0), tokenizer).train
    assert plain.example.user_text == ""


def test_held_out_rows_by_seed(make_config, write_rows, tokenizer):
    path = write_rows(additions(300))

    def split(seed):
        dataset = load_dataset(make_config(path=path, eval_rows=40, seed=seed), tokenizer)
        assert dataset.bad_rows == {}
        held_out, train = questions(dataset.eval), questions(dataset.train)
        assert len(held_out) == 40
        assert len(train) == 260
        assert not set(held_out) & set(train)
        return held_out

    assert split(0) == split(0)
    assert set(split(0)) != set(split(1))


def test_a_repeated_question_is_never_on_both_sides(make_config, write_rows, tokenizer):
    rows = [{"question": f"{i % 10}+1", "answer": f"={i}"} for i in range(50)]
    dataset = load_dataset(make_config(path=write_rows(rows), eval_rows=8), tokenizer)
    held_out, train = questions(dataset.eval), questions(dataset.train)
    assert len(held_out) == len(set(held_out)) == 8
    assert not set(held_out) & set(train)
    assert len(train) == 10
    assert dataset.bad_rows == {"question of the evaluation": 32}


def test_an_evaluation_file_is_kept_out_of_training(make_config, write_rows, tokenizer):
    path = write_rows(additions(30))
    eval_path = write_rows([*additions(5), b"{"], "eval.jsonl")
    config = make_config(path=path, eval_path=eval_path, max_bad_share=0.2)
    dataset = load_dataset(config, tokenizer)
    assert sorted(questions(dataset.eval)) == sorted(row["question"] for row in additions(5))
    assert questions(dataset.train) == [row["question"] for row in additions(30)[5:]]
    assert dataset.bad_rows == {"bad JSON": 1, "question of the evaluation": 5}
    fewer = config.model_copy(update={"eval_rows": 2})
    assert len(load_dataset(fewer, tokenizer).eval) == 2


def test_training_and_evaluation_on_the_same_file(make_config, write_rows, tokenizer):
    path = write_rows(additions(5))
    with pytest.raises(InputError) as caught:
        load_dataset(make_config(path=path, eval_path=path), tokenizer)
    assert str(caught.value) == (
        f"{path}: every row asks a question of data.eval_path={path}; "
        "give different questions to train on"
    )


def test_more_held_out_rows_than_questions(make_config, write_rows, tokenizer):
    path = write_rows(additions(8))
    with pytest.raises(InputError) as caught:
        load_dataset(make_config(path=path, eval_rows=8), tokenizer)
    assert str(caught.value) == (
        f"{path}: data.eval_rows=8 leaves none of its 8 questions to train on; "
        "lower it or set data.eval_path"
    )


def test_slices_join_without_loss(make_config, write_rows, tokenizer, monkeypatch):
    path = write_rows(additions(50))
    whole = load_dataset(make_config(path=path, eval_rows=0), tokenizer)
    monkeypatch.setattr("nrt_jax.data.pipeline.ROWS_PER_SLICE", 7)
    sliced = load_dataset(make_config(path=path, eval_rows=0), tokenizer)
    assert [e.example for e in sliced.train] == [e.example for e in whole.train]
    for a, b in zip(sliced.train, whole.train, strict=True):
        assert a.prompt_tokens.tolist() == b.prompt_tokens.tolist()
        assert a.answer_tokens.tolist() == b.answer_tokens.tolist()


def test_real_rows(mistral, shared_data, make_config, write_rows):
    lines = (shared_data / "gsm8k" / "train.jsonl").read_bytes().splitlines()[:1000]
    limits = {"max_answer_tokens": 256, "max_bad_share": 0.1}
    config = make_config(path=write_rows(lines), eval_rows=100, **limits)
    dataset = load_dataset(config, mistral)
    assert dataset.bad_rows.keys() == {"answer too long"}
    assert len(dataset.train) + 100 + sum(dataset.bad_rows.values()) == 1000
    assert max(len(e.answer_tokens) for e in dataset.train) <= 256
    assert all(mistral.special_ids.isdisjoint(e.answer_tokens[:-1]) for e in dataset.train)
    assert all(e.answer_tokens[-1] == mistral.eos_id for e in dataset.train)
    assert all(mistral.decode(e.answer_tokens[:-1]) == e.example.answer for e in dataset.eval)


# --- generators ----------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["chain_addition", "chain_documents"])
def test_generated_rows(source, make_config, tokenizer):
    config = make_config(source, eval_rows=64, chain={"rows": 200, "digits": 5})
    dataset = load_dataset(config, tokenizer)
    assert len(dataset.train) == 200
    assert len(dataset.eval) == 64
    batches = list(islice(BatchIterator(dataset.train, 50, True, 0), 4))
    assert sorted(chain.from_iterable(indices(batches))) == list(range(200))
    train = {question for batch in batches for question in questions(batch)}
    assert train.isdisjoint(questions(dataset.eval))
    for example in chain.from_iterable(batches):
        assert tokenizer.decode(example.prompt_tokens) == f"<|bos|>{example.example.question}"
        assert tokenizer.decode(example.answer_tokens) == f"{example.example.answer}<|eos|>"
        assert tokenizer.unk_id not in example.answer_tokens
    with pytest.raises(IndexError):
        dataset.train[200]


def test_the_evaluation_does_not_depend_on_the_seed(make_config, tokenizer):
    one, two = (
        load_dataset(make_config("chain_addition", eval_rows=32, seed=seed), tokenizer)
        for seed in (0, 1)
    )
    assert questions(one.eval) == questions(two.eval)
    assert questions([one.train[i] for i in range(8)]) != questions(
        [two.train[i] for i in range(8)]
    )


def test_generated_rows_obey_the_limits(make_config, tokenizer):
    config = make_config("chain_addition", eval_rows=1, max_prompt_tokens=13)
    with pytest.raises(
        InputError, match=r"^data\.source=chain_addition: the prompt '.*' has 14 tok"
    ):
        load_dataset(config, tokenizer)

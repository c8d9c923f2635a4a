"""What decides an answer: the settings of a task, and the identity of each request."""

from types import SimpleNamespace

import pytest

from nrt_jax.engine.sampling import Sampling
from nrt_jax.errors import InputError
from nrt_jax.evaluation.requests import asked_answers, given_answers, read_drawing


def request(document: int, *args, task: str = "gsm8k", idx: int = 0) -> SimpleNamespace:
    return SimpleNamespace(task_name=task, doc_id=document, idx=idx, args=args)


def test_settings_of_tasks_are_read_as_lm_eval_means_them():
    assert read_drawing("t", {}).sampling == Sampling(0.0)
    assert read_drawing("t", {"do_sample": False, "temperature": 0.7}).temperature == 0.0
    assert read_drawing("t", {"do_sample": True}).temperature == 1.0
    assert read_drawing("t", {"temperature": 0.8, "top_p": 0.95}).sampling == Sampling(
        0.8, top_p=0.95
    )
    assert read_drawing("t", {"until": "\n\n", "max_gen_toks": 15}).until == ("\n\n",)
    assert read_drawing("t", {"until": ["a", "b"]}).until == ("a", "b")
    with pytest.raises(InputError, match=r"task t: generation_kwargs.beams is not known; use"):
        read_drawing("t", {"beams": 2})


def test_repeats_have_draws_of_their_own_whatever_their_order():
    """lm-eval hands over the same request as often as there are samples."""
    one, other = request(0, "x", {"temperature": 0.8}), request(1, "y", {"temperature": 0.8})
    asked = asked_answers([one, one, other, one], 0)
    assert [(a.document, a.repeat) for a in asked] == [(0, 0), (0, 1), (1, 0), (0, 2)]
    assert len({a.key for a in asked}) == 4
    again = asked_answers([other, one, one, one], 0)
    assert {a.key for a in again} == {a.key for a in asked}


def test_everything_that_decides_an_answer_is_in_its_key():
    settings = {"max_gen_toks": 5, "until": ["a"], "temperature": 0.5, "top_p": 0.5}
    base = request(0, "x", settings)
    others = [
        request(1, "x", settings),
        request(0, "y", settings),
        request(0, "x", settings, task="math"),
        *(
            request(0, "x", settings | {name: value})
            for name, value in (
                ("max_gen_toks", 6),
                ("until", ["b"]),
                ("temperature", 0.6),
                ("top_p", 0.6),
            )
        ),
    ]
    keys = [asked_answers([each], 0)[0].key for each in (base, *others)]
    keys += [asked_answers([base], 1)[0].key, asked_answers([base], 0, 64)[0].key]
    assert len(set(keys)) == len(keys)
    assert asked_answers([base], 0)[0].key == keys[0]


def test_given_answers_are_told_apart_by_their_texts():
    given = given_answers([request(0, "x", " a"), request(0, "x", " b", idx=1)], 0)
    assert [(g.choice, g.answer) for g in given] == [(0, " a"), (1, " b")]
    assert given[0].key != given[1].key

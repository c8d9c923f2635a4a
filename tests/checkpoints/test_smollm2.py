"""SmolLM2: 9 query heads over 3 key/value heads, a tied head, bfloat16 weights, a chat template
with a system turn of its own; the published model, and a random one of the same shape.
"""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

from nrt_jax.checkpoints import load_pretrained
from nrt_jax.checkpoints.abstract_model import abstract_model
from nrt_jax.checkpoints.directory_config import directory_config
from nrt_jax.checkpoints.import_format import read_params
from nrt_jax.data.row_tokens import RowTokenizer
from nrt_jax.engine.generate import generate
from nrt_jax.engine.make import answer_stop_ids, make_engine
from nrt_jax.engine.requests import Request
from nrt_jax.engine.sampling import Sampling
from tests.models.parity import assert_parity
from tests.models.references import compute_reference, load_model
from tests.models.smollm2 import write_small_smollm2
from tests.models.tiny import mesh


def check_greedy_text(directory: Path, questions: list[str], new_tokens: int) -> None:
    """Prompts are those of `apply_chat_template`, and each token of the engine's greedy answers is
    the most probable one of transformers after the tokens before it.
    """
    config, tokenizer = directory_config(directory, [])
    model = abstract_model(config, tokenizer, lambda _: mesh(), add_think_rows=False)
    rows = RowTokenizer(config.data, tokenizer)
    prompts = [rows.of_question(question) for question in questions]
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    for question, prompt in zip(questions, prompts, strict=True):
        turns = [{"role": "user", "content": question}]
        expected = theirs.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)
        assert prompt.tolist() == expected["input_ids"]
    engine = make_engine(
        config,
        model,
        slots=len(prompts),
        longest_prompt=max(map(len, prompts)),
        new_tokens=new_tokens,
        stop_ids=answer_stop_ids(config, tokenizer),
    )
    params = read_params(directory, model.target)
    requests = [Request(p, i, 1, new_tokens, Sampling(0.0)) for i, p in enumerate(prompts)]
    groups = generate(engine, params, requests, jax.random.key(0))
    reference = load_model(directory)
    for prompt, (answer,) in zip(prompts, groups, strict=True):
        ended = [] if answer.end_token is None else [answer.end_token]
        written = [*answer.tokens.tolist(), *ended]
        assert ended or len(written) == new_tokens
        with torch.no_grad():
            logits = reference(torch.tensor([[*prompt, *written]])).logits[0]
        most_probable = logits[len(prompt) - 1 : -1].argmax(-1).tolist()
        assert most_probable == written, theirs.decode(most_probable)


def test_greedy_text_of_a_random_model_equals_transformers(tmp_path):
    questions = ["Natalia sold 48 clips", "the user asks"]
    check_greedy_text(write_small_smollm2(tmp_path / "model"), questions, 24)


@pytest.fixture(scope="module")
def questions(shared_data) -> list[str]:
    lines = (shared_data / "gsm8k" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["question"] for line in lines[:20]]


@pytest.mark.slow
def test_logits_and_gradients_of_the_published_model_equal_transformers(
    smollm2, questions, tmp_path
):
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2)
    ids_BT = np.asarray([tokenizer.encode("\n".join(questions))[:384]], np.int32)
    assert ids_BT.shape == (1, 384)
    reference = compute_reference(smollm2, ids_BT, tmp_path / "gradients")
    definition, state = nnx.split(load_pretrained(smollm2))
    assert_parity(definition, nnx.to_pure_dict(state), reference)


@pytest.mark.slow
def test_greedy_text_of_the_published_model_equals_transformers(smollm2, questions):
    check_greedy_text(smollm2, questions, 200)

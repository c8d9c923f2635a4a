"""The rows with which new think tokens start: what is tried, what is chosen and written down."""

import json
import logging
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nrt_jax.checkpoints import abstract_model
from nrt_jax.checkpoints.open import open_model
from nrt_jax.checkpoints.token_rows import RowNames, with_new_rows
from nrt_jax.config.load import load_config
from nrt_jax.config.run import RunConfig
from nrt_jax.data.pipeline import load_dataset
from nrt_jax.data.row_tokens import RowTokenizer
from nrt_jax.data.tokenizer import Tokenizer
from nrt_jax.engine.make import trace_engine
from nrt_jax.errors import InputError
from nrt_jax.models.decoder import abstract_decoder
from nrt_jax.training import first_rows
from nrt_jax.training.first_rows import AUTO, Candidate, choose, first_params, turn_opening
from nrt_jax.training.loop import train
from tests.data.templates import TEMPLATES
from tests.models.smollm2 import write_small_smollm2
from tests.serving.runs import write_chat_model
from tests.training.plain_loss import Policy, log_softmax
from tests.training.runs import TinyRun

NEW_NAMES = ("data.think_start=<think>", "data.think_end=</think>")
SIZES = ("train.batch_prompts=8", "train.mini_batch_prompts=8", "train.micro_batch_prompts=8")
LINE_BREAK, EOS, MEAN = r"\n", "<|eos|>", "mean:vocabulary"
"""The candidates of the quickstart's tokenizer, which has no letters."""


# --- candidates ----------------------------------------------------------------------------------


def question_tokens(model: Path, *overrides: str) -> tuple[Tokenizer, np.ndarray]:
    """The tokenizer of a directory, and x of a question."""
    words = [f"model.path={model}", "data.source=chain_addition", "data.template=tokenizer"]
    config = load_config(RunConfig, [], [*words, *overrides])
    tokenizer = abstract_model.load_tokenizer(config)
    return tokenizer, RowTokenizer(config.data, tokenizer).of_question("the user asks")


def test_candidates_of_a_chat_model(tmp_path):
    tokenizer, prompt = question_tokens(write_small_smollm2(tmp_path / "model"))
    assert first_rows.candidate_names(tokenizer, prompt) == [
        LINE_BREAK,
        "<|im_end|>",
        "<|im_start|>",
        "text:Let's think",
        MEAN,
    ]


@pytest.mark.parametrize(
    ("kind", "template", "opening"),
    [("llama3", "llama3", "<|start_header_id|>"), ("prepend", "mistral", "[INST]")],
)
def test_the_token_that_opens_the_turn(kind, template, opening, tmp_path):
    model = write_chat_model(tmp_path / "model", TEMPLATES[template], kind=kind)
    tokenizer, prompt = question_tokens(model)
    found = turn_opening(tokenizer, prompt.tolist())
    assert found is not None
    assert tokenizer.token(found) == opening
    _, plain = question_tokens(model, "data.template=plain")
    assert turn_opening(tokenizer, plain.tolist()) is None


# --- the choice ----------------------------------------------------------------------------------


def chosen(figures, named=(AUTO, AUTO)) -> tuple[RowNames, int]:
    """What is chosen from a, b and c, by non-empty share and loss of y*, and how many are tried."""

    def measure(rows: RowNames) -> Candidate:
        share, loss = figures[rows]
        return Candidate(rows, share, tokens=5.0, direct=-1.0, empty=-1.0 - loss)

    best, tried = choose(measure, ["a", "b", "c"], RowNames(*named))
    return best.rows, len(tried)


SAME = {("a", "a"): (0.2, 0.0), ("b", "b"): (0.95, 0.3), ("c", "c"): (1.0, 0.4)}


@pytest.mark.parametrize(
    ("after_b", "expected"),
    [
        ({("b", "a"): (1.0, 0.3), ("b", "c"): (1.0, 0.5)}, ("b", "b")),
        ({("b", "a"): (1.0, 0.1), ("b", "c"): (1.0, 0.2)}, ("b", "a")),
        ({("b", "a"): (0.5, 0.0), ("b", "c"): (1.0, 0.2)}, ("b", "c")),
    ],
    ids=["first of equals", "other end", "empty traces"],
)
def test_non_empty_traces_come_first_then_the_smallest_loss(after_b, expected):
    """b and c have enough traces, so that the loss decides; the end token is tried after that."""
    assert chosen(SAME | after_b) == (expected, 5)


def test_no_other_end_is_tried_where_the_loss_is_small():
    good = {("a", "a"): (0.2, 0.0), ("b", "b"): (0.95, 0.04), ("c", "c"): (1.0, 0.4)}
    assert chosen(good) == (("b", "b"), 3)


def test_without_enough_traces_the_most_are_chosen():
    few = {("a", "a"): (0.2, 0.0), ("b", "b"): (0.3, 0.01), ("c", "c"): (0.1, 0.0)}
    after_b = {("b", "a"): (0.1, 0.0), ("b", "c"): (0.1, 0.0)}
    assert chosen(few | after_b) == (("b", "b"), 5)


def test_a_row_with_a_name_is_kept():
    with_z = {("a", "z"): (1.0, 0.3), ("b", "z"): (1.0, 0.1), ("c", "z"): (1.0, 0.4)}
    assert chosen(with_z, (AUTO, "z")) == (("b", "z"), 3)
    after_z = {("z", "a"): (1.0, 0.3), ("z", "b"): (1.0, 0.2), ("z", "c"): (1.0, 0.1)}
    assert chosen(after_z, ("z", AUTO)) == (("z", "c"), 3)


# --- figures of a model --------------------------------------------------------------------------


class World:
    """A tiny model without think tokens, on the devices of the tests."""

    def __init__(self, tiny_config: Path, directory: Path, *overrides: str):
        words = [*SIZES, *NEW_NAMES, f"run_dir={directory}", *overrides]
        self.config = load_config(RunConfig, [tiny_config], words)
        self.tokenizer = abstract_model.load_tokenizer(self.config)
        self.model = abstract_model.abstract_model(self.config, self.tokenizer)
        self.on_engine = abstract_model.engine_model(self.config, self.model)
        self.engine = trace_engine(self.config, self.on_engine, self.tokenizer)
        self.examples = load_dataset(self.config.data, self.tokenizer).train

    def first(self, recorded=None) -> first_rows.FirstParams:
        traces = self.on_engine, self.engine
        return first_params(
            self.config, self.tokenizer, self.model, traces, self.examples, recorded
        )


@pytest.fixture(scope="module")
def world(tiny_config, tmp_path_factory) -> World:
    return World(tiny_config, tmp_path_factory.mktemp("world") / "run")


@pytest.fixture(scope="module")
def first(world) -> first_rows.FirstParams:
    return world.first()


def test_the_figures_are_those_of_the_answers(world, first):
    """One plain forward pass per sequence, with the rows of the candidate."""
    base = abstract_model.read_params(world.config, world.model)
    start, end = world.tokenizer.think_start_id, world.tokenizer.think_end_id
    tried = [(c["think_start"], c["think_end"]) for c in first.new_rows["candidates"]]
    assert tried[:3] == [(LINE_BREAK,) * 2, (EOS,) * 2, (MEAN,) * 2]
    (start_row,) = {name for name, _ in tried[3:]}
    assert first.new_rows["think_start"] == start_row
    assert len(set(tried)) == 5
    examples = first_rows.trial_examples(world.examples, world.config.seed)
    assert len(examples) == first_rows.ROWS
    definition = nnx.graphdef(abstract_decoder(world.model.architecture, vocab_multiple=128))
    for candidate in first.new_rows["candidates"]:
        rows = RowNames(candidate["think_start"], candidate["think_end"])
        params = jax.device_get(with_new_rows(base, world.tokenizer, rows))
        policy = Policy(definition, params, start, end)
        for name, context in (("direct", []), ("empty", [start, end])):
            means = []
            for example in examples:
                before, answer = [*example.prompt_tokens, *context], example.answer_tokens
                log_pi = log_softmax(policy._logits(np.asarray([*before, *answer], np.int32)))
                means.append(
                    np.mean([log_pi[len(before) - 1 + t, y] for t, y in enumerate(answer)])
                )
            np.testing.assert_allclose(candidate[name], np.mean(means), atol=2e-4)
        assert 0 <= candidate["non_empty_share"] <= 1
        assert candidate["tokens"] <= first_rows.TOKENS


def test_the_same_seed_chooses_the_same(world, first):
    again = world.first()
    assert again.new_rows == first.new_rows
    assert all(jax.tree.leaves(jax.tree.map(jnp.array_equal, again.params, first.params)))


def test_recorded_rows_are_not_chosen_anew(world, monkeypatch):
    monkeypatch.setattr(first_rows, "choose", None)
    recorded = {"think_start": MEAN, "think_end": EOS, "candidates": []}
    params, new_rows = world.first(recorded)
    assert new_rows == recorded
    base = abstract_model.read_params(world.config, world.model)
    expected = with_new_rows(base, world.tokenizer, RowNames(MEAN, EOS))
    np.testing.assert_array_equal(params["embedding"], expected["embedding"])


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param(("model.new_rows_from=+",), marks=pytest.mark.slow),
        pytest.param(("model.new_rows_from=null",), marks=pytest.mark.slow),
        ("data.think_start=<|think_start|>", "data.think_end=<|think_end|>"),
        ("method=sft",),
    ],
    ids=["named", "eos", "think tokens of the checkpoint", "sft"],
)
def test_nothing_is_tried_without_need(overrides, tiny_config, tmp_path, monkeypatch):
    monkeypatch.setattr(first_rows, "choose", None)
    quick = ("train.steps=1", "evaluation.examples=0", "objective.kl_coefficient=0")
    run = TinyRun(tiny_config, tmp_path / "run")
    words = [*SIZES, *NEW_NAMES, *quick, *overrides, f"run_dir={run.directory}"]
    train(load_config(RunConfig, [tiny_config], words))
    assert "new_rows" not in json.loads((run.directory / "versions.json").read_text())


def test_weights_that_give_nan_are_one_line(world, monkeypatch):
    def spoiled(*_):
        params = abstract_model.init_params(world.config, world.model, world.tokenizer)
        scale = params["final_norm"]["scale"]
        return params | {"final_norm": {"scale": jnp.full_like(scale, jnp.nan)}}

    monkeypatch.setattr(first_rows, "read_params", spoiled)
    with pytest.raises(InputError, match=r"log P\(y\*\|x\) is nan and, after the empty trace, nan"):
        world.first()


# --- a run ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_records_its_choice_and_goes_on_with_it(
    tiny_config, tmp_path, monkeypatch, caplog, words
):
    run = TinyRun(tiny_config, tmp_path / "run")
    quick = ["evaluation.examples=0", "optimizer.schedule=constant", "optimizer.warmup_ratio=0"]
    quick += ["optimizer.learning_rate=1e-30", "optimizer.weight_decay=0"]
    overrides = [*SIZES, *NEW_NAMES, *quick, f"run_dir={run.directory}"]
    config = load_config(RunConfig, [tiny_config], [*overrides, "train.steps=1"])
    with caplog.at_level(logging.INFO, "nrt_jax"):
        train(config)
    versions = json.loads((run.directory / "versions.json").read_text())
    new_rows = versions["new_rows"]
    rows = RowNames(new_rows["think_start"], new_rows["think_end"])
    assert caplog.text.count(" %, ") == len(new_rows["candidates"])
    assert f"  {rows.think_start}, {rows.think_end}: " in caplog.text
    assert "<think> (id 25) starts as " in caplog.text
    opened = open_model(run.directory)
    base = abstract_model.read_params(config, opened.model)
    expected = with_new_rows(base, opened.tokenizer, rows)
    np.testing.assert_allclose(opened.params["embedding"], expected["embedding"], atol=1e-6)
    assert words("export", run.directory, tmp_path / "export")[0] == 0
    card = (tmp_path / "export" / "README.md").read_text()
    assert f"the row of `<think>` was that of `{rows.think_start}`" in card
    assert card.count("% | -") == len(new_rows["candidates"])
    # The rows are in the checkpoint; the reference of the KL term takes the recorded ones.
    monkeypatch.setattr(first_rows, "choose", None)
    train(load_config(RunConfig, [tiny_config], [*overrides, "train.steps=2"]))
    assert json.loads((run.directory / "versions.json").read_text()) == versions
    assert run.metrics()[-1]["step"] == 2
    assert abs(run.metrics()[-1]["loss/kl"]) < 1e-6

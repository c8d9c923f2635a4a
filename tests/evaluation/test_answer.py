"""A trained run put to use: `generate` and `export`, through the command line."""

import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nrt_jax.checkpoints.hf_config import read_architecture
from nrt_jax.checkpoints.open import open_model
from nrt_jax.checkpoints.run_dir import load_run
from nrt_jax.data.pipeline import load_dataset
from nrt_jax.data.row_tokens import RowTokenizer
from nrt_jax.data.tokenizer import Tokenizer
from tests.models.tiny import read
from tests.objective import oracle
from tests.training.runs import TinyRun

PROMPT = "1+2+3"


@pytest.fixture(scope="module")
def run(reference) -> TinyRun:
    return reference("method=nrt")


def weights(run: TinyRun, step: int) -> dict[str, np.ndarray]:
    return {k: v for k, v in run.arrays(step).items() if k.startswith("['params']")}


# --- generate -------------------------------------------------------------------------------------


def test_prints_trace_and_answer(run, words):
    status, out, err = words("generate", run.directory, "--prompt", PROMPT, "--prompt", "4+4+0")
    assert (status, err) == (0, "")
    prompt, trace, answer, second, *_ = out.splitlines()
    assert prompt == f"prompt  {PROMPT}"
    assert trace.startswith("trace   ")
    assert " tokens, ended by " in trace
    assert answer.startswith("answer  ")
    assert second == "prompt  4+4+0"


def test_generates_alike_from_the_newest_checkpoint_and_by_its_step(run, words):
    arguments = ("--prompt", PROMPT, "--temperature", 5, "--seed", 3)
    newest = words("generate", run.directory, *arguments)
    assert newest == words("generate", run.checkpoints / "8", *arguments)
    drawn = {words("generate", run.directory, *arguments[:-1], seed) for seed in range(3)}
    assert len(drawn) > 1


def test_loads_the_checkpoint_that_is_named(run):
    for step in run.steps:
        loaded = open_model(run.checkpoints / str(step)).params
        theirs = {
            jax.tree_util.keystr(path): leaf
            for path, leaf in jax.tree_util.tree_leaves_with_path({"params": loaded})
        }
        for name, array in weights(run, step).items():
            assert np.asarray(theirs[name]).tobytes() == array.tobytes(), (step, name)


def test_a_run_is_only_read(run):
    before = {path: path.stat().st_mtime_ns for path in run.directory.rglob("*")}
    open_model(run.directory)
    assert {path: path.stat().st_mtime_ns for path in run.directory.rglob("*")} == before


def test_the_newest_is_damaged(run, tmp_path, words):
    copy = tmp_path / "run"
    shutil.copytree(run.directory, copy)
    shutil.rmtree(copy / "checkpoints" / "8" / "state")
    expected = words("generate", run.checkpoints / "6", "--prompt", PROMPT)
    assert words("generate", copy, "--prompt", PROMPT) == expected
    status, _, err = words("generate", copy / "checkpoints" / "8", "--prompt", PROMPT)
    assert status == 2
    assert err.startswith(f"nrt-jax: error: {copy}/checkpoints/8: cannot be read (")
    assert err.count("\n") == 1
    assert (copy / "checkpoints" / "8").exists()


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        (
            "1+x+3y",
            "the prompt '1+x+3y' has characters that the tokenizer cannot spell ('xy'); use",
        ),
        (
            "1+2+3+4+5+6+7",
            "has 14 tokens, more than data.max_prompt_tokens=12; raise it or shorten",
        ),
        ("", "'question' is ''; fill it in or drop the row"),
    ],
)
def test_prompts(prompt, said, run, words):
    status, out, err = words("generate", run.directory, "--prompt", prompt)
    assert (status, out) == (2, "")
    assert err.startswith("nrt-jax: error: --prompt: ")
    assert said in err
    assert err.count("\n") == 1


def test_a_prompt_is_tokenised_like_a_row(run):
    config = load_run(run.directory).data
    tokenizer = Tokenizer.load(config.tokenizer)
    for example in load_dataset(config, tokenizer).eval:
        prompt = RowTokenizer(config, tokenizer).of_question(example.example.question)
        assert prompt.dtype == example.prompt_tokens.dtype
        assert prompt.tolist() == example.prompt_tokens.tolist()


@pytest.mark.parametrize("verb", ["generate", "export"])
def test_no_run(verb, run, tmp_path, words):
    more = ("--prompt", "1") if verb == "generate" else (tmp_path / "out",)
    missing = tmp_path / "none"
    empty = tmp_path / "empty"
    shutil.copytree(run.directory, empty, ignore=shutil.ignore_patterns("checkpoints"))
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").touch()
    for path, said in (
        (
            missing,
            f"{missing}: no such directory; name a run, RUN/checkpoints/STEP, an import, or a "
            "Hugging Face directory",
        ),
        (
            other,
            f"{other}: holds no model: no config.yaml (a run), and no config.json beside "
            "*.safetensors (a Hugging Face directory) or params/ (an import); name one of these, "
            "or RUN/checkpoints/STEP",
        ),
        (empty, f"{empty}: has no checkpoint yet; train it first"),
        (
            run.checkpoints / "7",
            f"{run.checkpoints}/7: no such checkpoint; there are {run.steps}",
        ),
    ):
        assert words(verb, path, *more) == (2, "", f"nrt-jax: error: {said}\n")
    assert not (empty / "checkpoints").exists()
    assert not (tmp_path / "out").exists()


# --- generate --score -----------------------------------------------------------------------------

SCORE = re.compile(r"score   R (\S+), after the empty trace (\S+); log c (\S+) nats per token")


def scores(out: str) -> list[list[float]]:
    """R, the baseline's, and log c per token, of each prompt."""
    return [[float(number) for number in found] for found in SCORE.findall(out)]


def by_hand(run: TinyRun, question: str, answer: str) -> list[float]:
    """The same from whole forwards: a greedy trace token by token, then y* after it."""
    trained = open_model(run.directory)
    tokenizer, decoder = trained.tokenizer, nnx.merge(trained.model.definition, trained.params)
    prompt = RowTokenizer(trained.config.data, tokenizer).of_question(question).tolist()
    reference = [*tokenizer.encode(answer), tokenizer.eos_id]

    def log_pi(tokens: list[int]) -> np.ndarray:
        padded = np.zeros((1, 32), np.int32)
        padded[0, : len(tokens)] = tokens
        return np.asarray(jax.nn.log_softmax(decoder(jnp.asarray(padded))[0], axis=-1))

    def log_c(trace: list[int]) -> list[float]:
        tokens = [*prompt, tokenizer.think_start_id, *trace, tokenizer.think_end_id, *reference]
        rows, first = log_pi(tokens), len(tokens) - len(reference)
        return [float(rows[first + i - 1, token]) for i, token in enumerate(reference)]

    trace: list[int] = []
    while len(trace) < trained.config.rollout.max_trace_tokens:
        tokens = [*prompt, tokenizer.think_start_id, *trace]
        token = int(log_pi(tokens)[len(tokens) - 1].argmax())
        if token in tokenizer.special_ids:
            break
        trace.append(token)
    after, base = log_c(trace), log_c([])
    reward, baseline = (
        oracle.aggregate("ws_neg_log_p", c, base, "sum", 1e4)[0] for c in (after, base)
    )
    return [reward, baseline, float(np.mean(after))]


def test_scores_the_answer_after_the_trace(run, words):
    pairs = {PROMPT: "=1", "4+4+0": "=3"}
    arguments = [word for q, y in pairs.items() for word in ("--prompt", q, "--score", y)]
    status, out, err = words("generate", run.directory, *arguments)
    assert (status, err) == (0, "")
    expected = [by_hand(run, question, answer) for question, answer in pairs.items()]
    np.testing.assert_allclose(scores(out), expected, rtol=1e-3)
    # The trace and the answer are those of the command without it.
    plain = words("generate", run.directory, "--prompt", PROMPT, "--prompt", "4+4+0")[1]
    kept = [line for line in out.splitlines() if not line.startswith("score ")]
    assert kept == plain.splitlines()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ("--score", "=1", "--score", "=2"),
            "--score: 2 answers for 1 prompts; give one for each --prompt, in the same order",
        ),
        (("--score", "x"), "--score: the answer 'x' has characters that the tokenizer cannot"),
        (("--score", ""), "--score: 'answer' is ''; fill it in or drop the row"),
        (
            ("--score", "=1234"),
            "--score: the answer '=1234' has 6 tokens, more than data.max_answer_tokens=4",
        ),
    ],
)
def test_answers_that_cannot_be_scored(arguments, said, run, words):
    status, out, err = words("generate", run.directory, "--prompt", PROMPT, *arguments)
    assert (status, out) == (2, "")
    assert err.startswith(f"nrt-jax: error: {said}")
    assert err.count("\n") == 1


def test_a_run_without_traces_has_nothing_to_score_after(reference, words):
    directory = reference("method=sft").directory
    status, out, err = words("generate", directory, "--prompt", PROMPT, "--score", "=1")
    assert (status, out) == (2, "")
    assert err == (
        f"nrt-jax: error: --score: {directory} answers without a trace (method sft); name a "
        "model of method nrt, or leave it out\n"
    )


# --- export ---------------------------------------------------------------------------------------


def exported(directory: Path) -> dict:
    """The weights with the padding of the vocabulary that a run has by default."""
    return read(directory, read_architecture(directory), vocab_multiple=128)


def test_exports_what_was_trained(run, tmp_path, words):
    out = tmp_path / "model"
    assert words("export", run.directory, out) == (0, f"wrote {out}\n", "")
    loaded = open_model(run.directory)
    assert read_architecture(out) == loaded.model.architecture
    assert read_architecture(out).vocab_size == 25
    for mine, theirs in zip(
        jax.tree.leaves(loaded.params), jax.tree.leaves(exported(out)), strict=True
    ):
        assert np.asarray(mine).tobytes() == np.asarray(theirs).tobytes()
    Tokenizer.load(out)


def test_the_padding_of_the_vocabulary_is_never_trained(run):
    params = open_model(run.directory).params
    assert params["embedding"].shape[0] == params["head"].shape[1] == 128
    assert not np.any(params["embedding"][25:])
    assert not np.any(params["head"][:, 25:])
    assert np.any(params["head"][:, 24])


def test_exports_bfloat16(run, tmp_path, words):
    status, *_ = words("export", run.directory, tmp_path / "model", "--dtype", "bfloat16")
    assert status == 0
    params = open_model(run.directory).params
    rounded = np.asarray(params["embedding"].astype("bfloat16").astype("float32"))
    assert np.array_equal(np.asarray(exported(tmp_path / "model")["embedding"]), rounded)


def test_exports_a_model_that_trains_on(run, tmp_path, words):
    words("export", run.directory, tmp_path / "model")
    model = f"model.path={tmp_path / 'model'}"
    again = TinyRun(run.config, tmp_path / "run", (model, "train.steps=1", "method=sft"))
    again.trained(f"data.tokenizer={tmp_path / 'model'}")


def test_copies_rows(run, tmp_path, words):
    out = tmp_path / "model"
    pairs = (r"<|think_start|>=\n", "<|think_end|>==")
    arguments = [word for pair in pairs for word in ("--copy-row", pair)]
    assert words("export", run.directory, out, *arguments)[0] == 0
    tokenizer = Tokenizer.load(out)
    params, before = exported(out), open_model(run.directory).params
    for target, source in ((tokenizer.think_start_id, "\n"), (tokenizer.think_end_id, "=")):
        (source_id,) = tokenizer.encode(source)
        row = np.asarray(before["embedding"][source_id])
        assert np.array_equal(params["embedding"][target], row)
        assert not np.array_equal(before["embedding"][target], row)
        column = np.asarray(before["head"][:, source_id])
        assert np.array_equal(params["head"][:, target], column)


@pytest.mark.parametrize(
    ("pair", "said"),
    [
        ("<|think_start|>", "--copy-row <|think_start|>: must look like TOKEN=FROM"),
        ("<|think|>=1", "--copy-row <|think|>=1: '<|think|>' is no token of "),
        ("<|think_end|>=12", "--copy-row <|think_end|>=12: '12' is no token of "),
        ("<|think_end|>=é", "--copy-row <|think_end|>=é: 'é' is no token of "),
    ],
)
def test_rows_that_do_not_exist(pair, said, run, tmp_path, words):
    status, _, err = words("export", run.directory, tmp_path / "out", "--copy-row", pair)
    assert status == 2
    assert err.startswith(f"nrt-jax: error: {said}")
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_folder_in_use(run, tmp_path, words):
    (tmp_path / "notes.txt").write_text("mine")
    status, _, err = words("export", run.directory, tmp_path)
    assert (status, err) == (
        2,
        f"nrt-jax: error: {tmp_path}: exists and is not empty; give a new folder\n",
    )
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]

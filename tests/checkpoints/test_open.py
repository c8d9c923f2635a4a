"""One function for every directory that holds a model, and prompts as the model was trained on."""

import logging
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from nrt_jax.checkpoints.open import OpenModel, find_model, open_model
from nrt_jax.cli import main
from nrt_jax.data.row_tokens import RowTokenizer
from nrt_jax.errors import InputError
from nrt_jax.evaluation.answer import answer_prompts
from tests.data.templates import TEMPLATES
from tests.serving.runs import STEP, write_chat_model, write_run

LLAMA3 = TEMPLATES["llama3"]
NAMES = ("<think>", "</think>")
NAMED = [f"data.think_start={NAMES[0]}", f"data.think_end={NAMES[1]}"]
OPENS = LLAMA3 + "{% if add_generation_prompt %}{{ '<think>\\n' }}{% endif %}"
QUESTIONS = ["Natalia sold 48 clips", "  Die Straße\n"]
"""The tokenizer of the tests knows no other language."""


def prompts(opened: OpenModel) -> list[list[int]]:
    """What the model sees before it writes."""
    rows = RowTokenizer(opened.config.data, opened.tokenizer)
    asked = [rows.of_question(question, opened=opened.reasons) for question in QUESTIONS]
    return [ids.tolist() for ids in asked]


def verb(*words: object) -> None:
    assert main([str(word) for word in words]) == 0


# --- an export is asked as its run is ------------------------------------------------------------

RUNS = {
    "plain": ["data.template=plain"],
    "plain without bos": ["data.template=plain", "data.add_bos=false"],
    "tulu": ["data.template=tulu", *NAMED],
    "tokenizer": ["data.template=tokenizer", *NAMED],
    "opened": ["data.template=tokenizer", "data.template_file=OPENS", *NAMED],
    "sft": ["data.template=tulu", "method=sft"],
}


ASKED = {
    "method": True,
    "model": {"dtype"},
    "data": {"add_bos", "think_start", "think_end", "max_prompt_tokens", "max_answer_tokens"},
    "objective": {"scheme", "ws_normalisation", "weight_cap"},
    "rollout": {"max_trace_tokens", "max_response_tokens", "stop_tokens", "cache_dtype", "dtype"},
    "evaluation": {"max_answer_tokens"},
}
"""Settings that an answer or its reward depends on."""


@pytest.mark.parametrize("name", RUNS)
def test_prompts_and_limits_of_an_export_are_those_of_its_run(name, tmp_path):
    (tmp_path / "opens.jinja").write_text(OPENS)
    settings = [word.replace("OPENS", str(tmp_path / "opens.jinja")) for word in RUNS[name]]
    method = "sft" if name == "sft" else "nrt"
    model = write_chat_model(tmp_path / "model", LLAMA3)
    more = ["rollout.stop_tokens=[e]", "objective.scheme=gm", "objective.weight_cap=null"]
    more += ["rollout.cache_dtype=int8", "model.dtype=bfloat16", "data.max_prompt_tokens=90"]
    run = write_run(tmp_path, method, model, [*more, *settings])
    verb("export", run, tmp_path / "export", "--dtype", "fp32")
    verb("import", tmp_path / "export", tmp_path / "import")
    trained = open_model(run)
    assert (trained.found.kind, trained.step, trained.name) == ("run", STEP, "run")
    expected = prompts(trained)
    start = trained.tokenizer.think_start_id
    assert [x.count(start) for x in expected] == [0 if name == "sft" else 1] * 2
    for path, kind in (("export", "Hugging Face directory"), ("import", "import")):
        opened = open_model(tmp_path / path)
        assert (opened.found.kind, opened.step, opened.name) == (kind, None, path)
        assert prompts(opened) == expected
        assert opened.tokenizer.think_end_id == trained.tokenizer.think_end_id
        assert opened.vocab_size == trained.vocab_size
        assert opened.config.model_dump(include=ASKED) == trained.config.model_dump(include=ASKED)
        for name in ("embedding", "head"):
            np.testing.assert_array_equal(opened.params[name], trained.params[name])


# --- a directory that is no export of ours -------------------------------------------------------


@pytest.mark.parametrize("template", ["llama3", "chat"])
def test_a_chat_model_answers_as_transformers_has_it(template, tmp_path, caplog):
    """Also with a template that writes no beginning of sequence: then there is none."""
    model = write_chat_model(tmp_path / "model", TEMPLATES[template])
    with caplog.at_level(logging.INFO, "nrt_jax"):
        opened = open_model(model)
    assert "answers directly (its tokenizer lacks <|think_start|> and <|think_end|>)" in caplog.text
    assert not opened.reasons
    theirs = transformers.AutoTokenizer.from_pretrained(model)
    ids = theirs.apply_chat_template(
        [{"role": "user", "content": QUESTIONS[0]}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    assert prompts(opened)[0] == ids["input_ids"][0].tolist()
    reference = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    written = reference.generate(**ids, max_new_tokens=12, do_sample=False, eos_token_id=602)
    text = theirs.decode(written[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    (answer,) = answer_prompts(model, QUESTIONS[:1], overrides=["evaluation.max_answer_tokens=12"])
    assert answer == f"prompt  {QUESTIONS[0]}\nanswer  {text}"


@pytest.mark.parametrize("kind", ["llama3", "prepend"])
def test_a_model_that_answers_directly_draws_no_think_tokens(kind, tmp_path):
    """They would be rows that nobody trained, or reserved ones under another name."""
    template = LLAMA3 if kind == "llama3" else TEMPLATES["mistral"]
    opened = open_model(write_chat_model(tmp_path / "model", template, kind=kind))
    rows = opened.model.architecture.vocab_size
    assert opened.vocab_size == rows
    assert opened.params["head"].shape[1] == 128 * -(-rows // 128)
    assert opened.tokenizer.vocab_size == rows + (0 if kind == "llama3" else 2)
    asked = open_model(tmp_path / "model", ["method=nrt"])
    assert asked.vocab_size == asked.tokenizer.vocab_size
    eos = asked.tokenizer.eos_id
    for new in asked.tokenizer.new_ids:
        np.testing.assert_array_equal(
            asked.params["embedding"][new], asked.params["embedding"][eos]
        )


@pytest.mark.parametrize("template", [pytest.param(LLAMA3, marks=pytest.mark.slow), OPENS])
def test_a_directory_with_both_think_tokens_reasons(template, tmp_path):
    model = write_chat_model(tmp_path / "model", template, think=NAMES)
    assert not open_model(model).reasons
    opened = open_model(model, NAMED)
    assert opened.reasons
    theirs = transformers.AutoTokenizer.from_pretrained(model)
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    how = {"add_generation_prompt": True, "return_dict": False}
    ids = [theirs.apply_chat_template(chat, **how) for chat in chats]
    start = [] if template is OPENS else [opened.tokenizer.think_start_id]
    assert prompts(opened) == [[*x, *start] for x in ids]
    assert open_model(model, [*NAMED, "method=sft"]).config.method == "sft"
    with_answers = [*NAMED, "rollout.max_trace_tokens=4", "evaluation.max_answer_tokens=4"]
    (shown,) = answer_prompts(model, QUESTIONS[:1], overrides=with_answers)
    assert re.search(r"^trace   .*   \[\d tokens, ended by ", shown, re.M | re.S)


def test_without_a_chat_template_prompts_are_plain(tmp_path):
    model = write_chat_model(tmp_path / "model")
    opened = open_model(model)
    assert opened.config.data.template == "plain"
    theirs = transformers.AutoTokenizer.from_pretrained(model)
    assert prompts(opened) == [theirs.encode(question) for question in QUESTIONS]
    assert prompts(opened)[0][0] == opened.tokenizer.bos_id
    assert open_model(model, ["data.template=tulu"]).config.data.template == "tulu"


@pytest.mark.parametrize(("positions", "half"), [(4096, 1024), (200, 100)])
def test_limits_stay_within_the_positions(positions, half, tmp_path):
    model = write_chat_model(tmp_path / "model", LLAMA3, max_position_embeddings=positions)
    config = open_model(model).config
    assert config.data.max_prompt_tokens == config.data.max_answer_tokens == half
    reasoning = open_model(model, ["method=nrt"]).config
    assert reasoning.rollout.max_response_tokens == half
    assert reasoning.rollout.max_trace_tokens == reasoning.data.max_answer_tokens == half // 2
    # What follows from a limit follows the one that is set.
    small = open_model(model, ["method=nrt", "rollout.max_response_tokens=20"]).config
    assert small.rollout.max_trace_tokens == small.evaluation.max_answer_tokens == 10


def test_a_snapshot_of_a_cache_is_a_directory(tmp_path):
    """Its files are links, and its name is that of the repository."""
    model = write_chat_model(tmp_path / "model", LLAMA3)
    snapshot = tmp_path / "models--org--name" / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    for file in model.iterdir():
        (snapshot / file.name).symlink_to(file)
    opened = open_model(snapshot)
    assert opened.name == "org/name"
    assert prompts(opened) == prompts(open_model(model))
    verb("export", snapshot, tmp_path / "out", "--dtype", "bf16")
    assert not any(file.is_symlink() for file in (tmp_path / "out").iterdir())
    assert 'base_model: "org/name"' in (tmp_path / "out" / "README.md").read_text()


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("data.tmplate=plain", "override data.tmplate=plain: unknown key; did you mean 'template'"),
        ("dta.template=plain", "override dta: unknown key; did you mean 'data'?"),
        ("model.path=elsewhere", "override model.path=elsewhere: the model is that of "),
        ("data.think_end=<|eot_id|>", "data.think_end='<|eot_id|>' is the eos_token"),
        ("rollout.max_response_tokens=3", "must be greater than or equal to 4"),
    ],
)
def test_overrides(override, said, tmp_path):
    model = write_chat_model(tmp_path / "model", LLAMA3)
    with pytest.raises(InputError, match=re.escape(said)):
        open_model(model, [override])


def test_a_path_is_told_by_what_is_in_it(tmp_path):
    def touch(name: str) -> Path:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
        return tmp_path / name

    run = touch("run/config.yaml").parent
    assert find_model(run) == ("run", run, None)
    assert find_model(run / "checkpoints" / "7") == ("run", run, 7)
    directory = touch("checkpoints/7/config.json").parent
    assert find_model(directory).kind == "Hugging Face directory"
    touch("checkpoints/7/config.yaml")
    assert find_model(directory).kind == "Hugging Face directory"
    (directory / "params").mkdir()
    assert find_model(directory).kind == "import"
    other = touch("other/model.safetensors").parent
    with pytest.raises(InputError, match=r"holds no model: no config.yaml \(a run\), and no conf"):
        find_model(other)
    with pytest.raises(InputError, match="no such directory; name a run, RUN/checkpoints/STEP"):
        find_model(tmp_path / "missing")

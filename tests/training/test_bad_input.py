"""Settings, models and data that `nrt-jax train` refuses in one line, before the run begins."""

import json
from pathlib import Path

import pytest

from tests.training.runs import write_model

# --- config ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("train: {steps: 0}", "train.steps=0: must be greater than or equal to 1"),
        ("train: {stepps: 3}", "train.stepps: unknown key; did you mean 'steps'?"),
        ("train: [", "line 1: must be YAML"),
        ("- 1", "must be a mapping of keys to values"),
        ("method: ppo", "method=ppo: must be 'nrt' or 'sft'"),
    ],
)
def test_config_file(text, said, refused, tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    line = refused(path)
    assert line.startswith(f"{path}: ")
    assert said in line


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "train.stepps=3",
            "override train.stepps=3: unknown key; did you mean 'steps'?",
        ),
        (
            "objective.scheme=wsp",
            "override objective.scheme=wsp: must be '",
        ),
        ("train.mini_batch_prompts=3", "mini_batch_prompts 3 must divide batch_prompts 8"),
        ("train.micro_batch_prompts=3", "micro_batch_prompts 3 must divide mini_batch_prompts 8"),
        ("rollout.slots=0", "override rollout.slots=0: must be greater than or equal to 1"),
        (
            "rollout.slots=12",
            "rollout.slots=12 does not divide over mesh data*fsdp=8; use a multiple of 8",
        ),
        (
            "mesh.data=3",
            "mesh: data=3, fsdp=1, tensor=1, context=1 does not cover 8 devices; the sizes must",
        ),
        (
            "rollout.mesh.data=3",
            "rollout.mesh: data=3, fsdp=1, tensor=1, context=1 does not cover 8 devices; the sizes",
        ),
        (
            "rollout.mesh={data: 4, tensor: 2}",
            "rollout.mesh: tensor=2 does not divide layers.attention.key of size 1",
        ),
        (
            "rollout.devices=8",
            "rollout.devices=8: there are 8 devices, and training needs one or more of its own; "
            "give fewer, or null to share all",
        ),
        (
            "rollout.stop_tokens=[nonesuch]",
            "rollout.stop_tokens: 'nonesuch' is no token of ",
        ),
        (
            "rollout.stop_tokens=eos",
            "rollout.stop_tokens=eos: must be 'special' or 'think_end' or a list, such as [a, b]",
        ),
        (
            "rollout.staleness=1",
            "rollout.staleness 1 without an importance ratio: the traces are of older weights; set "
            "objective.old_logprobs=recompute and objective.importance_cap=2",
        ),
        ("rollout.staleness=2", "rollout.staleness=2: must be less than or equal to 1"),
        *(
            (
                f"rollout.{name}={value}",
                f"rollout.{name} {value} with objective.old_logprobs sampler: the trainer's "
                "logprobs are those of the plain softmax; set objective.old_logprobs=recompute",
            )
            for name, value in (
                ("top_p", 0.9),
                ("top_k", 5),
                ("min_p", 0.1),
                ("repetition_penalty", 1.2),
            )
        ),
        ("rollout.min_p=1.5", "rollout.min_p=1.5: must be less than or equal to 1"),
        ("rollout.cache_dtype=fp8", "rollout.cache_dtype=fp8: must be 'float32', 'bfloat16' or"),
        (
            "rollout={traces_per_prompt: 1, drop_zero_std_groups: true}",
            "rollout.drop_zero_std_groups with rollout.traces_per_prompt 1: the rewards "
            "of one trace have no standard deviation, so nothing is left to train on; sample 2 or "
            "more",
        ),
        (
            "checkpoint.best_metric=loss/total",
            "checkpoint.best_metric loss/total: the metrics of a step are those of the weights "
            "before its update, and the checkpoint has those after it; use a metric of the "
            "evaluation: eval/exact_match, ",
        ),
        (
            "checkpoint.best_metric=eval/exact_match",
            "checkpoint.every_steps 2 must be a multiple of evaluation.every_steps 3",
        ),
    ],
)
def test_settings(override, said, refused, tmp_path):
    assert said in refused(override)
    assert not (tmp_path / "run").exists()


def test_a_ratio_of_t_end_without_the_other_special_tokens(refused):
    line = refused("rollout.stop_tokens=think_end", "objective.trace_covers=z_and_end")
    assert line.endswith(
        "rollout.stop_tokens think_end with objective.trace_covers z_and_end: t_end is scored "
        "among all tokens; set objective.trace_covers=z"
    )


def test_no_config_file(refused, tmp_path):
    assert refused(config=tmp_path / "none.yaml") == f"{tmp_path}/none.yaml: no such config file"


# --- model, tokenizer, data -----------------------------------------------------------------------


def test_no_model(refused, tmp_path):
    line = refused(f"model.path={tmp_path}/none")
    assert line == f"{tmp_path}/none/config.json: no such file; give a Hugging Face model directory"


def test_half_a_model(refused, model_copy):
    weights = model_copy / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    line = refused(config=model_copy / "tiny.yaml")
    assert line.startswith(f"{weights}: cannot be read as safetensors: ")
    # The run has not begun, so the directory is free for a run with the model mended.
    assert not (model_copy / "run").exists()


def test_no_tokenizer(refused, tmp_path):
    line = refused(f"data.tokenizer={tmp_path}/none")
    assert line.startswith(f"{tmp_path}/none: no such tokenizer directory; set data.tokenizer")


def test_a_think_token_with_another_role(refused):
    line = refused("data.think_start=<|eos|>")
    assert "data.think_start='<|eos|>' is the eos_token of this tokenizer; choose a name" in line


def test_no_tokenizer_is_named(refused):
    line = refused("data.tokenizer=null", "model.path=null", "model.architecture.vocab_size=25")
    assert "data.tokenizer is null and model.path too; name a directory with a tokenizer" in line


def test_tokenizer_of_another_model(refused, tmp_path):
    write_model(tmp_path / "small", vocab_size=20)
    line = refused(f"model.path={tmp_path}/small")
    assert "has 25 tokens, the model's vocab_size is 20; use the tokenizer of the model" in line


def data_file(path: Path, *lines: str) -> tuple[str, ...]:
    path.write_text("\n".join(lines) + "\n")
    return (
        "data.source=jsonl",
        f"data.path={path}",
        "data.eval_rows=1",
        "data.max_bad_share=0.1",
    )


GOOD = [json.dumps({"question": f"{i % 10}+{i // 10}", "answer": "=3"}) for i in range(16)]


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ("{", "2 of 18 rows are unusable (2 bad JSON), more than data.max_bad_share=0.1; first"),
        (
            '{"question": "1"}',
            "first line 3: field 'answer' is missing (it has 'question'); add it",
        ),
        ('{"question": "1", "answer": " "}', "first line 3: 'answer' is ' '; fill it in or drop"),
        ('{"question": "1", "answer": true}', "first line 3: 'answer' is True; write it as a"),
        (
            '{"question": "1", "answer": "=12345"}',
            "first line 3: the answer '=12345' has 7 tokens, more than data.max_answer_tokens=4; "
            "raise it or shorten the row",
        ),
    ],
)
def test_rows(bad, said, refused, tmp_path):
    path = tmp_path / "rows.jsonl"
    line = refused(*data_file(path, *GOOD[:2], bad, bad, *GOOD[2:]))
    assert line.startswith(f"{path}: 2 of 18 rows are unusable")
    assert said in line


def test_no_data(refused, tmp_path):
    line = refused("data.source=jsonl", f"data.path={tmp_path}/none.jsonl")
    assert line == (
        f"{tmp_path}/none.jsonl: No such file or directory; set data.path or data.eval_path to a "
        "file"
    )


def test_too_little_data(refused, tmp_path):
    line = refused(*data_file(tmp_path / "rows.jsonl", *GOOD[:5]))
    assert "a batch of 8 prompts needs as many training rows, and the data has 4" in line

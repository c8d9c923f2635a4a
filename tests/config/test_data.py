"""Config mistakes that only the whole section can show."""

from pathlib import Path

import pytest

from nrt_jax.config.data import DataConfig
from nrt_jax.config.load import Section, dump_config, load_config
from nrt_jax.errors import InputError


class Run(Section):
    data: DataConfig


def message(*overrides: str) -> str:
    with pytest.raises(InputError) as caught:
        load_config(Run, [], ["data.tokenizer=somewhere", *overrides])
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_a_file_source_needs_a_path():
    assert "source 'parquet' needs a file; set data.path" in message("data.source=parquet")


def test_what_is_no_source():
    assert "no source needs a file; set data.path" in message("data.seed=1")
    part = "name: a, path: a.jsonl"
    for mixture, said in {
        "[{name: a}]": "the source a needs files; set its path",
        f"[{{{part}, weight: 1, rows: 2}}]": "the source a has weight and rows; leave one out",
        f"[{{{part}}}, {{{part}}}]": "mixture has two sources of the name a; rename one",
        f"[{{{part}}}, {{name: b, path: b, weight: 1}}]": "some sources of mixture have a weight",
        f"[{{{part}, wight: 1}}]": "data.mixture.0.wight=1: unknown key; did you mean 'weight'?",
    }.items():
        assert said in message(f"data.mixture={mixture}")
    both = message("data.path=x.jsonl", f"data.mixture=[{{{part}}}]")
    assert "mixture and path both name training rows; leave one out" in both


def test_one_way_to_read_a_row():
    preset = ("data.path=x.jsonl", "data.preset=alpaca", "data.answer_jinja=x")
    assert "preset=alpaca and answer_jinja both say how rows are read" in message(*preset)
    chat = message("data.path=x.jsonl", "data.preset=oasst")
    assert "preset=oasst makes conversations and template 'plain' has no turns" in chat


def test_a_path_may_be_a_list(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def path(text: str):
        return load_config(Run, [], [f"data.path={text}"]).data.path

    assert path("[a.jsonl, gs://b/c.jsonl]") == (tmp_path / "a.jsonl", "gs://b/c.jsonl")
    assert path("[ab]*.jsonl") == tmp_path / "[ab]*.jsonl"
    assert path("'[a]'") == tmp_path / "[a]"
    assert path("5") == tmp_path / "5"
    assert "must be a path or a list of paths" in message("data.path=[1]")


def test_a_config_with_several_sources_reads_back(tmp_path):
    parts = "{name: a, path: [x, gs://b/y], weight: 2}, {name: b, path: z, columns: [q], weight: 1}"
    run = load_config(Run, [], [f"data.mixture=[{parts}]"])
    (tmp_path / "saved.yaml").write_text(dump_config(run))
    assert load_config(Run, [tmp_path / "saved.yaml"]) == run
    assert run.data.location == "a + b"
    first, second = run.data.sources
    assert (first.mixture, second.columns, second.path) == ((), ("q",), Path("z").absolute())


def test_a_curriculum_needs_the_order_of_the_source():
    text = message("data.source=chain_documents", "data.chain.totals_rows=96")
    assert (
        "chain.totals_rows=96 is a curriculum and needs the order of the source; "
        "set data.shuffle=false"
    ) in text
    text = message("data.source=hard_documents", "data.hard_tokens.worked_rows=96")
    assert "hard_tokens.worked_rows=96 is a curriculum and needs the order of the source" in text


def test_shares_must_sum_to_one():
    text = message("data.source=chain_documents", "data.chain.copy_share=0.3")
    assert (
        "totals_share, nothing_share, noise_share and copy_share sum to 1.1; they must sum to 1"
    ) in text


def test_hard_tokens_has_three_to_eight_computed_words():
    text = message("data.source=hard_tokens", "data.hard_tokens.answer_tokens=200")
    assert (
        "answer_tokens=200 and hard_share=0.05 make 10 computed words, which must be 3 to 8; "
        "hard_share=0.040 makes 8"
    ) in text
    text = message("data.source=hard_documents", "data.hard_tokens.noise_share=0.3")
    assert "worked_share, nothing_share, noise_share and copy_share sum to 1.1" in text


@pytest.mark.parametrize(
    "override", ["chain.modulus=11", "hard_tokens.answer_tokens=59", "max_bad_share=1.5", "seed=-1"]
)
def test_values_out_of_range(override):
    assert f"data.{override}" in message("data.source=chain_addition", f"data.{override}")


def test_a_generator_needs_no_file():
    run = load_config(Run, [], ["data.tokenizer=somewhere", "data.source=chain_addition"])
    assert run.data.path is None


def test_a_template_file_needs_a_chat_template():
    text = message("data.source=chain_addition", "data.template_file=/t.jinja")
    assert (
        "template_file=/t.jinja is a chat template and template 'plain' has none; "
        "set data.template=tokenizer"
    ) in text


def test_the_tokenizer_may_be_that_of_the_model():
    assert load_config(Run, [], ["data.source=chain_addition"]).data.tokenizer is None

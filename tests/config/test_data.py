"""Config mistakes that only the whole section can show."""

import pytest

from nrt_jax.config.data import DataConfig
from nrt_jax.config.load import Section, load_config
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


def test_a_curriculum_needs_the_order_of_the_source():
    text = message("data.source=chain_documents", "data.chain.totals_rows=96")
    assert (
        "chain.totals_rows=96 is a curriculum and needs the order of the source; "
        "set data.shuffle=false"
    ) in text


def test_shares_must_sum_to_one():
    text = message("data.source=chain_documents", "data.chain.copy_share=0.3")
    assert (
        "totals_share, nothing_share, noise_share and copy_share sum to 1.1; they must sum to 1"
    ) in text


@pytest.mark.parametrize("override", ["chain.modulus=11", "max_bad_share=1.5", "seed=-1"])
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

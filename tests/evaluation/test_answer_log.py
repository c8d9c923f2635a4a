"""What a log keeps, when it is written, and what a killed run finds again."""

import pytest

from nrt_jax.errors import InputError
from nrt_jax.evaluation import answer_log
from nrt_jax.evaluation.answer_log import (
    AnswerLog,
    AnswerRow,
    answer_key,
    check_identity,
    read_answers,
    seed_of,
)


def row(number: int, **fields) -> AnswerRow:
    fields = {"answer": f"answer {number}", "answer_end": "stop"} | fields
    return AnswerRow(answer_key(number), "task", number, 0, 0, **fields)


def test_rows_are_found_again_after_the_log_is_closed(tmp_path):
    rows = [row(0), row(1, trace="z", trace_end="closed", trace_ids=[4, 5], trace_tokens=2)]
    with AnswerLog(tmp_path / "answers") as log:
        log.add(rows[0])
        log.add(rows[1])
    again = AnswerLog(tmp_path / "answers")
    assert len(again) == 2
    assert again[rows[1].key] == rows[1]
    assert answer_key(2) not in again
    assert list(read_answers(tmp_path)) == rows


def test_a_killed_process_loses_the_last_seconds_alone(tmp_path):
    """Without leaving: what was written before is whole."""
    log = AnswerLog(tmp_path / "answers", flush_s=0.0)
    log.add(row(0))
    log._flush_s = 1e9
    log.add(row(1))
    again = AnswerLog(tmp_path / "answers")
    assert row(0).key in again
    assert row(1).key not in again


def test_an_error_keeps_what_came(tmp_path):
    def asked() -> None:
        with AnswerLog(tmp_path / "answers") as log:
            log.add(row(0))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        asked()
    assert len(AnswerLog(tmp_path / "answers")) == 1


def test_files_are_bounded_and_go_on(tmp_path, monkeypatch):
    monkeypatch.setattr(answer_log, "SHARD_ROWS", 2)
    for first in (0, 3):
        with AnswerLog(tmp_path / "answers") as log:
            for number in range(first, first + 3):
                log.add(row(number))
    names = sorted(path.name for path in (tmp_path / "answers").iterdir())
    assert names == ["00000.parquet", "00001.parquet", "00002.parquet"]
    assert [r.document for r in read_answers(tmp_path)] == list(range(6))


def test_a_damaged_file_is_named_with_the_remedy(tmp_path):
    folder = tmp_path / "answers"
    folder.mkdir()
    (folder / "00000.parquet").write_bytes(b"PAR1 cut")
    with pytest.raises(InputError, match=r"00000.parquet: cannot be read .*delete it, and its"):
        AnswerLog(folder)


def test_rows_count_what_never_closed_and_what_was_cut():
    assert row(0, trace_end="length").unclosed
    assert row(0, trace_end="<|eos|>").unclosed
    assert not row(0, trace_end="closed").unclosed
    assert not row(0).unclosed
    assert row(0, answer_end="length").truncated
    assert not row(0, answer_end="until").truncated


def test_keys_and_seeds_follow_from_what_was_asked():
    assert answer_key("a", 1) == answer_key("a", 1) != answer_key("a", 2)
    seeds = {seed_of(answer_key(number)) for number in range(100)}
    assert len(seeds) == 100
    assert min(seeds) < 0 < max(seeds) < 2**63


def test_a_folder_is_of_one_model(tmp_path):
    check_identity(tmp_path / "out", {"model": "a", "weights": "1"})
    check_identity(tmp_path / "out", {"model": "a", "weights": "1"})
    with pytest.raises(InputError, match=r"holds answers with weights '1', and now it is '2'"):
        check_identity(tmp_path / "out", {"model": "a", "weights": "2"})

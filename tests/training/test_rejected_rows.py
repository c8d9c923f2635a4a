"""Rows that training leaves out are logged by reason and named in the run directory."""

import json

from nrt_jax.config.load import load_config
from nrt_jax.config.run import RunConfig
from nrt_jax.data.bad_rows import Rejected
from nrt_jax.data.pipeline import Dataset
from nrt_jax.training.setup import report_bad_rows


def test_rows_that_are_left_out_are_reported(tmp_path, caplog):
    words = ["model.path=m", "data.source=chain_addition", f"run_dir={tmp_path}"]
    config = load_config(RunConfig, [], words)
    rejected = [Rejected("/x/a.jsonl", "line 3", "bad JSON", "'{' is not JSON", "")]
    counts = {"bad JSON": 1, "question of the evaluation": 12}
    report_bad_rows(config, Dataset([], [], counts, rejected))
    assert [record.getMessage() for record in caplog.records] == [
        f"data: 13 rows left out, those that could not be used in {tmp_path}/rejected.jsonl",
        "data: 12  question of the evaluation",
        "data:  1  bad JSON",
    ]
    (line,) = (tmp_path / "rejected.jsonl").read_text().splitlines()
    assert json.loads(line) == rejected[0]._asdict()
    # A later start over data without such rows names none.
    report_bad_rows(config, Dataset([], [], {}))
    assert not (tmp_path / "rejected.jsonl").exists()
    assert len(caplog.records) == 3

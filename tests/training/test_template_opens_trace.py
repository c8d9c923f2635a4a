"""A run whose chat template opens the trace, and a run on from its export."""

import json

import pytest

from nrt_jax.checkpoints.open import open_model
from nrt_jax.cli import main
from nrt_jax.data.row_tokens import RowTokenizer
from tests.training.runs import TinyRun

WRITES = "{{ bos_token }}{{ messages[0].content }}{% if add_generation_prompt %}OPENING{% endif %}"
STEPS = ("train.steps=2", "evaluation.score_references=true", "data.max_prompt_tokens=16")


@pytest.mark.slow
@pytest.mark.parametrize("opening", ["<|think_start|>", "<|think_start|>\\n", ""])
def test_training_and_training_on_from_the_export(opening, tiny_config, tmp_path):
    """The trainer scores the sequences that the engine wrote; the export asks as the run does."""
    path = tmp_path / "template.jinja"
    path.write_text(WRITES.replace("OPENING", f"{{{{ '{opening}' }}}}"))
    words = (*STEPS, "data.template=tokenizer", f"data.template_file={path}")
    run = TinyRun(tiny_config, tmp_path / "first", words)
    run.trained()
    metrics = [json.loads(line) for line in (run.directory / "metrics.jsonl").open()]
    assert max(row["mismatch/max"] for row in metrics if "mismatch/max" in row) < 1e-4
    model = tmp_path / "model"
    assert main(["export", str(run.directory), str(model)]) == 0
    words = (*STEPS, "data.template=tokenizer", f"model.path={model}", f"data.tokenizer={model}")
    again = TinyRun(tiny_config, tmp_path / "second", words)
    again.trained()
    prompts = [
        RowTokenizer(opened.config.data, opened.tokenizer).of_question("1+2", opened=True).tolist()
        for opened in map(open_model, (run.directory, model, again.directory))
    ]
    assert prompts[0] == prompts[1] == prompts[2]
    assert prompts[0].count(4) == 1  # the id of t_start

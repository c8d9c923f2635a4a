"""A run, its checkpoint, its export and the import of that: each answers as the others do."""

from pathlib import Path

import pytest

from nrt_jax.cli import main
from nrt_jax.config.serving import ServingConfig
from nrt_jax.evaluation.answer import answer_prompts
from nrt_jax.serving.served_model import open_served
from nrt_jax.serving.server import make_server
from tests.data.templates import TEMPLATES
from tests.serving.live import listening
from tests.serving.models import DECODE_STEPS, SLOTS
from tests.serving.runs import STEP, write_chat_model, write_run

KINDS = ("run", "checkpoint", "export", "import")
QUESTION = "Die Straße über"
RUN = [
    "data.template=tokenizer",
    "data.think_start=<think>",
    "data.think_end=</think>",
    "data.max_prompt_tokens=96",
    "rollout.max_trace_tokens=12",
    "rollout.max_response_tokens=32",
    "evaluation.max_answer_tokens=18",
]


@pytest.fixture(scope="module")
def paths(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("kinds")
    model = write_chat_model(folder / "model", TEMPLATES["llama3"])
    run = write_run(folder, "nrt", model, RUN)
    assert main(["export", str(run), str(folder / "export"), "--dtype", "fp32"]) == 0
    assert main(["import", str(folder / "export"), str(folder / "import")]) == 0
    found = {"run": run, "checkpoint": run / "checkpoints" / str(STEP)}
    return found | {kind: folder / kind for kind in KINDS[2:]}


@pytest.fixture(scope="module")
def generated(paths) -> dict[str, str]:
    """What `generate` prints for each."""
    return {kind: "\n".join(answer_prompts(path, [QUESTION])) for kind, path in paths.items()}


def test_generate_prints_the_same(generated):
    assert generated["run"].startswith(f"prompt  {QUESTION}\ntrace   ")
    assert set(generated.values()) == {generated["run"]}


@pytest.mark.parametrize("kind", KINDS)
def test_serve_answers_as_generate_does(kind, paths, generated):
    config = ServingConfig(slots=SLOTS, decode_steps=DECODE_STEPS, name="tiny")
    served = open_served(paths[kind], config)
    with listening(make_server(served, config)) as live:
        message = live.chat(QUESTION).json["choices"][0]["message"]
        (card,) = live.get("/v1/models").json["data"]
    assert f"trace   {message['reasoning_content']}   [" in generated[kind]
    assert generated[kind].endswith(f"\nanswer  {message['content']}")
    assert card["step"] == (STEP if kind in KINDS[:2] else None)
    assert served.opened.description == {
        "export": "Hugging Face directory",
        "import": "import",
    }.get(kind, f"step {STEP}")

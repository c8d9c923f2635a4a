"""The model card of an export: what the model is, what it was trained on, how its output reads."""

import json
from collections.abc import Iterator
from pathlib import Path

import nrt_jax
from nrt_jax.checkpoints import import_format, run_dir
from nrt_jax.checkpoints.open import OpenModel
from nrt_jax.checkpoints.token_rows import RowNames
from nrt_jax.config.run import RunConfig
from nrt_jax.config.schemes import SCHEMES
from nrt_jax.data.tokenizer import Tokenizer

PIPE = r"\|"
_USE = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
model = AutoModelForCausalLM.from_pretrained(".")
messages = [{"role": "user", "content": "..."}]
ids = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
)
print(tokenizer.decode(model.generate(**ids, max_new_tokens=512)[0]))
```"""


def trained_card(opened: OpenModel) -> str:
    """Markdown for a run's model; it names files and models, but no path of this machine."""
    config, tokenizer = opened.config, opened.tokenizer
    base = base_name(config)
    front = [
        *([] if base is None else [f"base_model: {json.dumps(base)}"]),
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [reasoning, native-reasoning-training, nrt-jax]",
    ]
    rows = {
        "base model": base or "none: random weights",
        "method": _method(config),
        "data": _data(config),
        "step": f"{opened.step} of {config.train.steps}, {config.train.batch_prompts} prompts each",
        "learning rate": f"{config.optimizer.learning_rate:g}, {config.optimizer.schedule}",
        "seed": str(config.seed),
        "made with": f"nrt_jax {nrt_jax.__version__}",
    }
    return "\n".join(
        [
            "---",
            *front,
            "---",
            "",
            f"# {config.run_dir.resolve().name}",
            "",
            "| | |",
            "| --- | --- |",
            *(f"| {name} | {value} |" for name, value in rows.items()),
            "",
            "## Format of the output",
            "",
            _output_format(config, tokenizer),
            "",
            *_new_rows(opened),
            _USE,
            "",
        ]
    )


def converted_card(path: Path) -> str:
    """Markdown for a checkpoint that was imported and never trained."""
    name = import_format.source_name(path)
    return (
        f"---\nbase_model: {json.dumps(name)}\nlibrary_name: transformers\n"
        f"pipeline_tag: text-generation\n---\n\n# {name}\n\nThe weights, tokenizer "
        f"and output format of {name}, written by "
        f"nrt_jax {nrt_jax.__version__}; nothing was trained.\n"
    )


def base_name(config: RunConfig) -> str | None:
    """Name of the checkpoint that a run started from; of the import's source if it was imported."""
    return None if config.model.path is None else import_format.source_name(config.model.path)


def _method(config: RunConfig) -> str:
    if config.method == "sft":
        return "supervised fine-tuning on the reference answers, without traces"
    name, scheme = config.objective.scheme, SCHEMES[config.objective.scheme]
    return (
        "[Native Reasoning Training](https://arxiv.org/abs/2602.11549), "
        f"{scheme.title}: {scheme.reward} (`objective.scheme: {name}`), "
        f"{config.rollout.traces_per_prompt} traces per prompt"
    )


def _data(config: RunConfig) -> str:
    data = config.data
    name = data.short_location(1)
    if data.path is not None and data.source is not None:
        name += f" ({data.source})"
    template = data.template if data.template_file is None else data.template_file.name
    return f"{name}, prompt template `{template}`; questions and answers only"


def _new_rows(opened: OpenModel) -> Iterator[str]:
    """Where the rows of the think tokens started, if the run chose them itself."""
    new_rows = run_dir.recorded_new_rows(opened.found.directory)
    if new_rows is None:
        return
    start, end = opened.config.data.think_start, opened.config.data.think_end
    yield (
        "The base model had no think tokens. Before training, the row of "
        f"`{start}` was that of `{new_rows['think_start']}`, and the row of `{end}` that of "
        f"`{new_rows['think_end']}`: of the candidates with non-empty traces this one changes the "
        "log-probability of the reference answer y* least, when an empty trace precedes it."
    )
    yield ""
    titles = [f"`{start}`", f"`{end}`", "non-empty traces", "log P(y* | x)", "log P, empty trace"]
    yield f"| {' | '.join(title.replace('|', PIPE) for title in titles)} |"
    yield "| --- | --- | --- | --- | --- |"
    for candidate in new_rows["candidates"]:
        names = [f"`{candidate[key]}`" for key in RowNames._fields]
        figures = [f"{candidate[key]:.3f}" for key in ("direct", "empty")]
        cells = [*names, f"{candidate['non_empty_share']:.0%}", *figures]
        # A pipe ends a cell even inside code, such as that of <|im_end|>.
        yield f"| {' | '.join(cell.replace('|', PIPE) for cell in cells)} |"
    yield ""


def _output_format(config: RunConfig, tokenizer: Tokenizer) -> str:
    eos = tokenizer.token(tokenizer.eos_id)
    if config.method == "sft":
        return f"The answer, then `{eos}`."
    start, end = (
        tokenizer.token(token) for token in (tokenizer.think_start_id, tokenizer.think_end_id)
    )
    return (
        f"A reasoning trace, then the answer: `{start}` trace `{end}` answer `{eos}`. The chat "
        f"template ends the prompt with `{start}`, as in training, so that generated text begins "
        f"inside the trace; the answer is what follows `{end}`. Decode with "
        "`skip_special_tokens=False` to see the markers. In training traces were sampled at "
        f"temperature {config.rollout.temperature:g} with at most "
        f"{config.rollout.max_trace_tokens} tokens."
    )

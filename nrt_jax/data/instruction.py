"""Prompts that ask the model to think first: an instruction in the system turn of a row."""

from collections.abc import Collection, Iterator

import numpy as np

from nrt_jax.config.data import DataConfig
from nrt_jax.data.bad_rows import BadRow, shorten
from nrt_jax.data.chat_template import QUESTION, PromptTemplate
from nrt_jax.data.generators import generate_row
from nrt_jax.data.prepared import prepared_directory, rows_by_number
from nrt_jax.data.row_tokens import RowTokenizer, as_text
from nrt_jax.data.rows import Row
from nrt_jax.data.tokenizer import Tokenizer
from nrt_jax.data.training_rows import read_source, sources_of
from nrt_jax.errors import InputError

INSTRUCTION = (
    "Before you answer, think about the question in two short sentences. Do not answer yet."
)
"""The default, of those that were tried the one under which the most texts end by themselves."""
TURN_TOKENS = 64
"""More than the header and the end of a system turn take."""


def find_instruction(given: str | None, config: DataConfig, tokenizer: Tokenizer) -> str:
    """The text for the system turn; "" where the model is to continue x freely.

    `given` is `warmup.instruction`: None takes the default where the template has a system turn.
    Raises InputError for a text that the template has no place for.
    """
    if given == "":
        return ""
    problem = _without_system_turn(config, tokenizer)
    if problem is None:
        return given or INSTRUCTION
    if given is None:
        return ""
    raise InputError(
        f"warmup.instruction={shorten(given)}: {problem}; set warmup.instruction='' to let the "
        "model continue x freely, or a data.template that has a system turn"
    )


def _without_system_turn(config: DataConfig, tokenizer: Tokenizer) -> str | None:
    """Why the template shows no system turn; None where it does."""
    template = PromptTemplate(config, tokenizer)
    if not template.is_chat:
        return "data.template=plain has no system turn"
    probe = "Think first."
    try:
        prompt = template.chat([{"role": "system", "content": probe}, *QUESTION])
    except BadRow as bad:
        return f"there is no system turn ({bad.detail})"
    return None if probe in prompt.text else "the chat template leaves a system turn out"


def instructed_prompts(
    config: DataConfig, tokenizer: Tokenizer, instruction: str, rows: Collection[int]
) -> dict[int, np.ndarray]:
    """x with the instruction in its system turn, int32, for training rows by their numbers.

    A row's own system turn stays, and the instruction follows it. The prompt may be longer than
    data.max_prompt_tokens by the instruction and its turn. Raises InputError for a row that the
    template refuses with a system turn.
    """
    longest = config.max_prompt_tokens + len(tokenizer.encode(instruction)) + TURN_TOKENS
    longer = config.model_copy(update={"max_prompt_tokens": longest})
    wanted, prompts = set(rows), {}
    for source, found in _rows(longer, wanted):
        instructed = (
            row._replace(fields=_instructed(row.fields, source, instruction)) for row in found
        )
        for row, tokenized in RowTokenizer(source, tokenizer).of_rows(instructed):
            if isinstance(tokenized, BadRow):
                raise InputError(
                    f"{source.location}: {row.place}: with warmup.instruction in the system turn: "
                    f"{tokenized.detail}"
                )
            prompts[row.number] = tokenized.prompt_tokens
    return prompts


def _rows(config: DataConfig, wanted: Collection[int]) -> Iterator[tuple[DataConfig, list[Row]]]:
    """The wanted training rows of each source, with its config; no more are read than needed."""
    if config.generated:
        yield config, _generated(config, wanted)
        return
    if (directory := prepared_directory(config)) is not None:
        yield config, list(rows_by_number(directory, config, sorted(wanted)))
        return
    first, missing = 0, set(wanted)
    for source in sources_of(config):
        assert source.path is not None, "DataConfig requires a path for file sources"
        found = []
        for row in read_source(source, source.path, first):
            first = row.number + 1
            if row.number in missing:
                found.append(row)
                missing.remove(row.number)
            if not missing:
                break
        yield source, found
        if not missing:
            return


def _generated(config: DataConfig, wanted: Collection[int]) -> list[Row]:
    rows = []
    for number in sorted(wanted):
        example = generate_row(config, number)
        fields = {config.question_field: example.question, config.answer_field: example.answer}
        rows.append(Row(number, f"row {number}", fields))
    return rows


def _instructed(fields: dict | BadRow, config: DataConfig, instruction: str) -> dict | BadRow:
    """The row as a conversation whose system turn ends with the instruction."""
    if isinstance(fields, BadRow):
        return fields
    turns = fields.get(config.messages_field)
    if turns is None:
        question, answer = fields[config.question_field], fields[config.answer_field]
        first = answer[0] if isinstance(answer, list) else answer
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": first}]
    own = [str(as_text(turn["content"])) for turn in turns[:1] if turn["role"] == "system"]
    content = "\n\n".join([*filter(str.strip, own), instruction])
    rest = turns[len(own) :]
    return {config.messages_field: [{"role": "system", "content": content}, *rest]}

"""Prompts that ask the model to think first: an instruction in the system turn of a row."""

from collections.abc import Collection, Iterator
from itertools import islice

import numpy as np

from nrt_jax.config.data import DataConfig
from nrt_jax.data import chain_addition
from nrt_jax.data.bad_rows import BadRow, shorten
from nrt_jax.data.chat_template import QUESTION, PromptTemplate
from nrt_jax.data.row_tokens import RowTokenizer, as_text
from nrt_jax.data.sources import Row, read_rows
from nrt_jax.data.tokenizer import Tokenizer
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
    wanted, row_tokenizer, prompts = set(rows), RowTokenizer(longer, tokenizer), {}
    found = (
        row._replace(fields=_instructed(row.fields, config, instruction))
        for row in _rows(config, wanted, row_tokenizer)
    )
    for row, tokenized in row_tokenizer.of_rows(islice(found, len(wanted))):
        if isinstance(tokenized, BadRow):
            raise InputError(
                f"{config.path or config.source}: {row.place}: with warmup.instruction in the "
                f"system turn: {tokenized.detail}"
            )
        prompts[row.number] = tokenized.prompt_tokens
    return prompts


def _rows(
    config: DataConfig, wanted: Collection[int], row_tokenizer: RowTokenizer
) -> Iterator[Row]:
    """The wanted training rows, as they stand in the source."""
    if config.source in ("jsonl", "parquet"):
        assert config.path is not None, "DataConfig requires a path for file sources"
        every = read_rows(config.source, config.path, row_tokenizer.fields_of)
        yield from (row for row in every if row.number in wanted)
        return
    documents = config.source == "chain_documents"
    make = chain_addition.document if documents else chain_addition.addition
    for number in sorted(wanted):
        example = make(config.chain, config.seed, number)
        fields = {
            config.question_field: example.question,
            config.answer_field: example.answer,
        }
        yield Row(number, f"row {number}", fields)


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

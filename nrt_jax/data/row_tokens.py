"""Rows → token ids: x with the template's control tokens, y* with the end-of-sequence token."""

import math
from collections.abc import Container, Iterable, Iterator, Sequence
from decimal import Decimal
from typing import NamedTuple

import numpy as np

from nrt_jax.config.data import DataConfig
from nrt_jax.data.bad_rows import BadRow, shorten
from nrt_jax.data.chat_template import Messages, Prompt, PromptTemplate
from nrt_jax.data.control_split import Text
from nrt_jax.data.rows import Row
from nrt_jax.data.tokenizer import Tokenizer
from nrt_jax.types import Example, TokenizedExample

ROLES = ("system", "user", "assistant")


class Rendered(NamedTuple):
    """One row as text."""

    prompt: Prompt
    answer: str
    """y*, without the end-of-sequence token."""
    aliases: tuple[str, ...] = ()
    """Other right answers."""
    user_text: str = ""
    """The last user turn, where a chat template surrounds it."""
    source: str = ""
    """What the row names as its source."""


class RowTokenizer:
    """Template and tokenizer of one config; InputError when the template cannot be read."""

    def __init__(self, config: DataConfig, tokenizer: Tokenizer, name: str = ""):
        """`name` is that of the source in a mixture, which its examples have."""
        self._config = config
        self._tokenizer = tokenizer
        self._name = name
        self._template = PromptTemplate(config, tokenizer)

    def fields_of(self, names: Container[str]) -> tuple[str, ...]:
        """Where the question and answer of a row stand which has the fields `names`."""
        config = self._config
        if self._template.is_chat and config.messages_field in names:
            return (config.messages_field,)
        return config.question_field, config.answer_field

    def of_rows(self, rows: Iterable[Row]) -> Iterator[tuple[Row, TokenizedExample | BadRow]]:
        """Each row, in order, with its ids or with the reason why it is unusable."""
        rendered = [(row, self._render(row)) for row in rows]
        encoded = self._encode([text for _, text in rendered if isinstance(text, Rendered)])
        for row, text in rendered:
            if isinstance(text, BadRow):
                yield row, text
                continue
            try:
                yield row, self._to_example(row.number, text, next(encoded))
            except BadRow as bad:
                yield row, bad

    def of_example(self, example: Example) -> TokenizedExample | BadRow:
        """The ids of a generated question and answer, or why they are unusable."""
        fields = self._fields(example.question, example.answer)
        ((_, tokenized),) = self.of_rows([Row(example.index, f"row {example.index}", fields)])
        return tokenized

    def of_question(self, question: str, *, opened: bool = False) -> np.ndarray:
        """x for a question, int32, or what its trace follows; BadRow when no row may have it."""
        rendered = self._render_fields(self._fields(question, "any"))
        return self._of_prompt(rendered, question, opened)

    def of_messages(
        self, messages: Sequence[dict[str, str]], *, opened: bool = False
    ) -> np.ndarray:
        """As `of_question` for the turns of a conversation before an answer.

        Its turns need not be those that a row may have: an earlier answer may be empty. Raises
        BadRow for what the template refuses or the vocabulary cannot spell. Without a chat template
        there must be one turn, of the user.
        """
        if self._template.is_chat:
            rendered = Rendered(self._template.chat(list(messages)), "any")
            contents = "".join(turn["content"] for turn in messages)
            return self._of_prompt(rendered, contents, opened)
        if len(messages) != 1 or messages[0]["role"] != "user":
            raise BadRow(
                "not one question",
                f"{len(messages)} messages, and data.template=plain has no place for other turns; "
                "send one message of the role 'user'",
            )
        return self.of_question(messages[0]["content"], opened=opened)

    def _of_prompt(self, rendered: Rendered, shown: str, opened: bool) -> np.ndarray:
        (ids,) = self._encode([rendered])
        self._check_controls(rendered, ids)
        prompt, after_start = self._prompt(rendered, ids)
        unknown = self._tokenizer.unk_id
        if unknown is not None and unknown in prompt:
            strange = [c for c in dict.fromkeys(shown) if unknown in self._tokenizer.encode(c)]
            raise BadRow(
                "prompt not in the vocabulary",
                f"the prompt {shorten(shown)} has characters that the tokenizer cannot spell "
                f"({shorten(''.join(strange))}); use those of its vocabulary",
            )
        follows = [self._tokenizer.think_start_id, *after_start] if opened else []
        return np.array([*prompt, *follows], np.int32)

    def _fields(self, question: str, answer: str) -> dict[str, str]:
        return {self._config.question_field: question, self._config.answer_field: answer}

    def _render(self, row: Row) -> Rendered | BadRow:
        if isinstance(row.fields, BadRow):
            return row.fields
        try:
            rendered = self._render_fields(row.fields)
            field = self._config.source_field
            return rendered if field is None else rendered._replace(source=_text(row.fields, field))
        except BadRow as bad:
            return bad

    def _render_fields(self, fields: dict) -> Rendered:
        """Apply the template to a row; BadRow when it lacks what the template needs."""
        messages, (answer, *aliases) = read_conversation(self._config, fields)
        if not self._template.is_chat:
            return Rendered(self._template.plain(messages[0]["content"]), answer, tuple(aliases))
        prompt = self._template.chat(messages)
        return Rendered(prompt, answer, tuple(aliases), last_user_turn(messages))

    def _encode(self, rendered: Sequence[Rendered]) -> Iterator[list[list[int]]]:
        """The ids of each row's texts, the answer last."""
        texts = [_texts(row) for row in rendered]
        ids: dict[bool, Iterator[list[int]]] = {
            starts: iter(
                self._tokenizer.encode_batch(
                    (text.text for row in texts for text in row if text.starts == starts),
                    starts=starts,
                )
            )
            for starts in (True, False)
        }
        return ([next(ids[text.starts]) for text in row] for row in texts)

    def _to_example(self, index: int, rendered: Rendered, ids: list[list[int]]) -> TokenizedExample:
        """Join the ids of a row's texts with its control tokens; BadRow when they break a rule."""
        self._check_controls(rendered, ids)
        answer = [*ids[-1], self._tokenizer.eos_id]
        self._check_spelling(rendered.answer, ids[-1])
        prompt, after_start = self._prompt(rendered, ids)
        limit = self._config.max_answer_tokens
        _check_length("answer", len(answer), limit, rendered.answer)
        return TokenizedExample(
            example=Example(
                index=index,
                question=rendered.prompt.text,
                answer=rendered.answer,
                aliases=rendered.aliases,
                user_text=rendered.user_text,
                source="/".join(filter(None, (self._name, rendered.source))),
            ),
            prompt_tokens=np.array(prompt, np.int32),
            answer_tokens=np.array(answer, np.int32),
            after_start_tokens=np.array(after_start, np.int32),
        )

    def _prompt(self, rendered: Rendered, ids: list[list[int]]) -> tuple[list[int], list[int]]:
        """x, and what the template writes after t_start; both count as the prompt's length."""
        texts = iter(ids)
        prompt: list[int] = []
        for piece in rendered.prompt.pieces:
            prompt += next(texts) if isinstance(piece, Text) else [piece]
        if not prompt:
            raise BadRow(
                "empty prompt",
                "the chat template writes nothing in front of the answer; set another, or "
                "data.add_bos=true",
            )
        after_start = [] if rendered.prompt.after_start is None else next(texts)
        limit, length = self._config.max_prompt_tokens, len(prompt) + len(after_start)
        _check_length("prompt", length, limit, rendered.prompt.text)
        return prompt, after_start

    def _check_controls(self, rendered: Rendered, ids: list[list[int]]) -> None:
        for i, text_ids in enumerate(ids):
            control = self._tokenizer.control_in(text_ids)
            if control is not None:
                text = _texts(rendered)[i].text
                raise BadRow(
                    "spells a control token", f"{shorten(text)} spells {control}; reword the text"
                )

    def _check_spelling(self, answer: str, ids: list[int]) -> None:
        """BadRow for an answer that the vocabulary cannot spell, so that no model can write it."""
        if self._tokenizer.unk_id is not None and self._tokenizer.unk_id in ids:
            raise BadRow(
                "answer not in the vocabulary",
                f"the answer {shorten(answer)} has characters that the tokenizer cannot spell; "
                "use another tokenizer or drop the row",
            )


def _texts(rendered: Rendered) -> list[Text]:
    """The texts of x in order, the one after t_start, then y*, which follows t_end."""
    after_start = rendered.prompt.after_start
    pieces = [*rendered.prompt.pieces, *([] if after_start is None else [after_start])]
    texts = [piece for piece in pieces if isinstance(piece, Text)]
    return [*texts, Text(rendered.answer, starts=False)]


def _check_length(what: str, length: int, limit: int, text: str) -> None:
    if length > limit:
        raise BadRow(
            f"{what} too long",
            f"the {what} {shorten(text)} has {length} tokens, more than "
            f"data.max_{what}_tokens={limit}; raise it or shorten the row",
        )


def read_conversation(config: DataConfig, fields: dict) -> tuple[Messages, list[str]]:
    """The turns of a row before its answer, and the right answers, of which the first is y*.

    With a chat template, x is every turn before the last assistant turn, and that turn is y*. A row
    without messages is a conversation of its question. Raises BadRow for a row without these.
    """
    if config.template != "plain" and config.messages_field in fields:
        messages, answer = _read_messages(fields[config.messages_field], config.messages_field)
        return messages, [answer]
    question = _text(fields, config.question_field)
    return [{"role": "user", "content": question}], _answers(fields, config.answer_field)


def last_user_turn(messages: Messages) -> str:
    """What the last user turn says; empty where there is none."""
    return next((turn["content"] for turn in messages[::-1] if turn["role"] == "user"), "")


def _read_messages(messages: object, field: str) -> tuple[Messages, str]:
    """The turns before the last assistant turn, and what that turn says."""
    if not isinstance(messages, list):
        raise BadRow(
            "messages not a list", f"'{field}' is {shorten(messages)}; give a list of turns"
        )
    turns = [_turn(message, f"{field}[{i}]") for i, message in enumerate(messages)]
    answers = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
    if not answers or answers[-1] == 0:
        raise BadRow(
            "no answered turn",
            f"'{field}' has no assistant turn after another turn; give at least user, assistant",
        )
    return turns[: answers[-1]], turns[answers[-1]]["content"]


def _turn(message: object, name: str) -> dict[str, str]:
    if not isinstance(message, dict):
        raise BadRow("bad turn", f"'{name}' is {shorten(message)}; give {{role, content}}")
    role = message.get("role")
    if role is None and "from" in message:
        raise BadRow(
            "bad turn",
            f"'{name}' has 'from' instead of 'role'; write {{role, content}}, with user for human "
            "and assistant for gpt",
        )
    if role not in ROLES:
        raise BadRow("bad role", f"'{name}.role' is {shorten(role)}; use {', '.join(ROLES)}")
    # An empty system turn is common, and says nothing wrong.
    content = _text(message, "content", f"{name}.content", may_be_empty=role == "system")
    return {"role": role, "content": content}


def _answers(fields: dict, key: str) -> list[str]:
    """The answer, or of a list of right answers all, the first of which is y*."""
    value = fields.get(key)
    if not isinstance(value, list):
        return [_text(fields, key)]
    if not value:
        raise BadRow(f"empty '{key}'", f"'{key}' is []; fill it in or drop the row")
    return [_text({key: answer}, key, f"{key}[{i}]") for i, answer in enumerate(value)]


def _text(fields: dict, key: str, name: str | None = None, *, may_be_empty: bool = False) -> str:
    name = name or key
    if key not in fields:
        has = ", ".join(map(repr, list(fields)[:5])) or "none"
        raise BadRow(f"without '{key}'", f"field '{name}' is missing (it has {has}); add it")
    value = as_text(fields[key])
    if value is None or isinstance(value, float):
        shown = "null" if value is None else value
        raise BadRow(f"'{key}' not text", f"'{name}' is {shown}; fill it in or drop the row")
    if not isinstance(value, str):
        raise BadRow(f"'{key}' not text", f"'{name}' is {shorten(value)}; write it as a string")
    if (not value or value.isspace()) and not may_be_empty:
        raise BadRow(f"empty '{key}'", f"'{name}' is {shorten(value)}; fill it in or drop the row")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        shown = shorten(value[error.start : error.end])
        raise BadRow(
            f"'{key}' not Unicode", f"'{name}' has the lone surrogate {shown}; escape it as a pair"
        ) from error
    return value


def as_text(value: object) -> object:
    """A number as text: one of JSON as it is written, a whole one of Parquet without fraction."""
    if isinstance(value, bool):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            return value
        return str(int(value)) if value.is_integer() and abs(value) < 2**53 else str(value)
    if isinstance(value, Decimal):
        return f"{value:f}"
    return str(value) if isinstance(value, int | str) else value

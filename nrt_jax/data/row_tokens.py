"""Rows → token ids: x with the template's control tokens, y* with the end-of-sequence token."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from nrt_jax.config.data import DataConfig
from nrt_jax.data.bad_rows import BadRow, shorten
from nrt_jax.data.chat_template import PromptTemplate, Rendered
from nrt_jax.data.control_split import Text
from nrt_jax.data.sources import Row
from nrt_jax.data.tokenizer import Tokenizer
from nrt_jax.types import Example, TokenizedExample


class RowTokenizer:
    """Template and tokenizer of one config; InputError when the template cannot be read."""

    def __init__(self, config: DataConfig, tokenizer: Tokenizer):
        self._config = config
        self._tokenizer = tokenizer
        self._template = PromptTemplate(config, tokenizer)

    def of_rows(self, rows: Iterable[Row]) -> Iterator[tuple[Row, TokenizedExample | BadRow]]:
        """Each row, in order, with its ids or with what makes it unusable."""
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
        """A generated question and answer with its ids, or with what makes it unusable."""
        fields = self._fields(example.question, example.answer)
        ((_, tokenized),) = self.of_rows([Row(example.index, f"row {example.index}", fields)])
        return tokenized

    def of_question(self, question: str) -> np.ndarray:
        """x of a row with this question, int32; BadRow when it would be a bad one."""
        return self._of_prompt(self._fields(question, "any"), question)

    def of_messages(self, messages: Sequence[dict[str, str]]) -> np.ndarray:
        """x of a row with these turns before its answer, int32; BadRow when it would be a bad one.

        Without a chat template the turns must be one question of the user.
        """
        if self._template.is_chat:
            turns = [*messages, {"role": "assistant", "content": "any"}]
            contents = "".join(str(turn.get("content", "")) for turn in messages)
            return self._of_prompt({self._config.messages_field: turns}, contents)
        if len(messages) != 1 or messages[0]["role"] != "user":
            raise BadRow(
                "not one question",
                f"{len(messages)} messages, and data.template=plain has no place for other turns; "
                "send one message of the role 'user'",
            )
        return self.of_question(messages[0]["content"])

    def _of_prompt(self, fields: dict, shown: str) -> np.ndarray:
        rendered = self._template.render(fields)
        (ids,) = self._encode([rendered])
        self._check_controls(rendered, ids)
        prompt = self._prompt(rendered, ids)
        unknown = self._tokenizer.unk_id
        if unknown is not None and unknown in prompt:
            strange = [c for c in dict.fromkeys(shown) if unknown in self._tokenizer.encode(c)]
            raise BadRow(
                "prompt not in the vocabulary",
                f"the prompt {shorten(shown)} has characters that the tokenizer cannot spell "
                f"({shorten(''.join(strange))}); use those of its vocabulary",
            )
        return np.array(prompt, np.int32)

    def _fields(self, question: str, answer: str) -> dict[str, str]:
        return {self._config.question_field: question, self._config.answer_field: answer}

    def _render(self, row: Row) -> Rendered | BadRow:
        if isinstance(row.fields, BadRow):
            return row.fields
        try:
            return self._template.render(row.fields)
        except BadRow as bad:
            return bad

    def _encode(self, rendered: Sequence[Rendered]) -> Iterator[list[list[int]]]:
        """The ids of every text of each row, its answer last."""
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
        prompt = self._prompt(rendered, ids)
        limit = self._config.max_answer_tokens
        _check_length("answer", len(answer), limit, rendered.answer)
        return TokenizedExample(
            example=Example(index, rendered.question, rendered.answer),
            prompt_tokens=np.array(prompt, np.int32),
            answer_tokens=np.array(answer, np.int32),
        )

    def _prompt(self, rendered: Rendered, ids: list[list[int]]) -> list[int]:
        texts = iter(ids)
        prompt: list[int] = []
        for piece in rendered.prompt:
            prompt += next(texts) if isinstance(piece, Text) else [piece]
        limit = self._config.max_prompt_tokens
        _check_length("prompt", len(prompt), limit, rendered.question)
        return prompt

    def _check_controls(self, rendered: Rendered, ids: list[list[int]]) -> None:
        for text, text_ids in zip(_texts(rendered), ids, strict=True):
            control = self._tokenizer.control_in(text_ids)
            if control is not None:
                raise BadRow(
                    "spells a control token",
                    f"{shorten(text.text)} spells {control}; reword the text",
                )

    def _check_spelling(self, answer: str, ids: list[int]) -> None:
        """The model cannot learn to write what its vocabulary cannot spell."""
        if self._tokenizer.unk_id is not None and self._tokenizer.unk_id in ids:
            raise BadRow(
                "answer not in the vocabulary",
                f"the answer {shorten(answer)} has characters that the tokenizer cannot spell; "
                "use another tokenizer or drop the row",
            )


def _texts(rendered: Rendered) -> list[Text]:
    """The texts of x in order, then y*, which follows the end of the trace."""
    prompt = [piece for piece in rendered.prompt if isinstance(piece, Text)]
    return [*prompt, Text(rendered.answer, starts=False)]


def _check_length(what: str, length: int, limit: int, text: str) -> None:
    if length > limit:
        raise BadRow(
            f"{what} too long",
            f"the {what} {shorten(text)} has {length} tokens, more than "
            f"data.max_{what}_tokens={limit}; raise it or shorten the row",
        )

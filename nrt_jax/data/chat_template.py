"""From the turns of a conversation to the prompt x, as texts and control tokens.

t_start and t_end are the method's: it puts t_start after x. A template may open the trace itself,
that is end a prompt with t_start, and white space behind it. x is then what precedes t_start, and
the trace follows the white space. A think token that a template writes elsewhere is refused.
"""

import logging
import re
from datetime import datetime
from importlib import resources
from typing import NamedTuple

import jinja2

from nrt_jax.config.data import DataConfig
from nrt_jax.data.bad_rows import BadRow
from nrt_jax.data.control_split import ControlSplit, Text, unmark
from nrt_jax.data.tokenizer import Tokenizer
from nrt_jax.data.tokenizer_files import OLD_TEMPLATE_FILE, SETTINGS_FILE, TEMPLATE_FILE, reading
from nrt_jax.errors import InputError
from nrt_jax.file_kinds import check_text, read_head

TODAY = datetime(2024, 7, 26)
"""What a template that asks for the date is told: Llama 3.2's own default, so that prompts are the
same on every day and a run that continues sees the same ids."""
_DIRECTIVES = [*"aAbBcdeHIjmMpSUwWxXyYzZ", *("-" + letter for letter in "dHIjmMS")]
_DATES = [("%" + directive, TODAY.strftime("%" + directive)) for directive in _DIRECTIVES]
_FILTERS = "".join(f" | replace({old!r}, {new!r})" for old, new in _DATES)
# transformers lets no function of ours into a template. Jinja leaves nothing of this line.
_DATE_MACRO = (
    "{% macro strftime_now(format) %}"
    f"{{{{ format | replace('%%', '\\0'){_FILTERS} | replace('\\0', '%') }}}}"
    "{% endmacro %}\n"
)

log = logging.getLogger(__name__)

THINK_TOKEN = "think token in the prompt"
_OPENS_TRACE = re.compile(r"<[^<>\s]*(?:think|thought|reason)[^<>\s/]*>\s*\Z", re.IGNORECASE)

Messages = list[dict[str, str]]
QUESTION: Messages = [{"role": "user", "content": "1+2"}]


class Prompt(NamedTuple):
    """x of one row."""

    pieces: tuple[int | Text, ...]
    """Texts, and ids of control tokens where these stand."""
    text: str
    """x as one text, without the beginning-of-sequence token in front."""
    after_start: Text | None = None
    """White space that the template writes after t_start, where it opens the trace."""


class PromptTemplate:
    """The template of one config, for one tokenizer.

    plain: x is the question as it is. Else x is what the chat template makes of the turns, with the
    header of the next turn. Raises InputError when the config's template cannot be read, and when
    it writes a think token into the prompt of a single question.
    """

    def __init__(self, config: DataConfig, tokenizer: Tokenizer):
        self._add_bos = config.add_bos
        self._tokenizer = tokenizer
        self._bos = "" if tokenizer.bos_id is None else tokenizer.token(tokenizer.bos_id)
        self._template = template_text(config, tokenizer)
        self._controls = ControlSplit(tokenizer)
        if self._template is not None:
            self._check_think_tokens(_place(config, tokenizer))

    @property
    def is_chat(self) -> bool:
        """Whether there is a chat template."""
        return self._template is not None

    def plain(self, question: str) -> Prompt:
        """x without a chat template."""
        bos_id = self._tokenizer.bos_id
        bos = () if bos_id is None or not self._add_bos else (bos_id,)
        return Prompt((*bos, Text(question, starts=True)), question)

    def chat(self, messages: Messages) -> Prompt:
        """x with a chat template; BadRow when it refuses the turns."""
        body = self._render(messages).removeprefix(self._bos)
        if self._bos and body.lstrip().startswith(self._bos):
            raise BadRow(
                "begins twice",
                f"the chat template writes {self._bos} twice, or after white space; let it begin "
                "with one or with none",
            )
        pieces = self._controls.split(self._bos + body if self._add_bos else body)
        return self._without_start(pieces, body)

    def _render(self, messages: Messages) -> str:
        """The rendered template, marks included.

        Templates of reasoning models drop what an earlier answer has up to t_end. Such answers keep
        the name of t_end as they have it, if the template does drop it.
        """
        assert self._template is not None, "a plain template takes no turns"
        mark, end = self._controls.mark, self._tokenizer.token(self._tokenizer.think_end_id)
        marked = [turn | {"content": mark(turn["content"])} for turn in messages]
        answers = [i for i, turn in enumerate(messages) if turn["role"] == "assistant"]
        if any(end in messages[i]["content"] for i in answers):
            kept = list(marked)
            for i in answers:
                before, found, after = messages[i]["content"].rpartition(end)
                kept[i] = messages[i] | {"content": mark(before) + found + mark(after)}
            body = render_template(self._template, kept, self._tokenizer)
            if end not in body:
                return body
        return render_template(self._template, marked, self._tokenizer)

    def _without_start(self, pieces: tuple[int | Text, ...], body: str) -> Prompt:
        """The prompt before a t_start at its end; BadRow for a think token anywhere else."""
        start_id, end_id = self._tokenizer.think_start_id, self._tokenizer.think_end_id
        last = pieces[-1] if pieces else None
        space = last if isinstance(last, Text) and last.text.isspace() else None
        before = pieces if space is None else pieces[:-1]
        after_start = None
        if before[-1:] == (start_id,):
            pieces, after_start = before[:-1], space
            body = body[: body.rindex(self._tokenizer.token(start_id))]
        found = next((piece for piece in pieces if piece in (start_id, end_id)), None)
        if isinstance(found, int):
            name, start = self._tokenizer.token(found), self._tokenizer.token(start_id)
            raise BadRow(
                THINK_TOKEN,
                f"the chat template writes {name} into the prompt, where {start} may stand at the "
                "end and nowhere else; set data.template_file to a copy of the template without "
                "it, or data.think_start and data.think_end to tokens that the template does not "
                "write",
            )
        return Prompt(pieces, unmark(body), after_start)

    def _check_think_tokens(self, place: str) -> None:
        """InputError for a template that no question can be asked with; warn of another t_start."""
        try:
            prompt = self.chat(QUESTION)
        except BadRow as bad:
            if bad.reason == THINK_TOKEN:
                raise InputError(f"{place}: {bad.detail}") from bad
            return  # a template may refuse this conversation and take others
        if match := _OPENS_TRACE.search(prompt.text):
            log.warning(
                "%s: ends a prompt with %s, which is not data.think_start=%s; to reason with the "
                "tokens of the template, set data.think_start and data.think_end to them",
                place,
                match[0].strip(),
                self._tokenizer.token(self._tokenizer.think_start_id),
            )


def template_text(config: DataConfig, tokenizer: Tokenizer) -> str | None:
    """The Jinja text of a config's chat template; None for template "plain".

    Raises InputError when there is no template to be had, or one that is not Jinja.
    """
    if config.template == "plain":
        return None
    place = _place(config, tokenizer)
    if config.template_file is not None:
        missing = "set data.template_file to a file"
        check_text(config.template_file, read_head(config.template_file))
        with reading(config.template_file, "not UTF-8", "save the file as UTF-8", missing):
            text = config.template_file.read_text(encoding="utf-8")
    elif config.template == "tulu":
        text = resources.files("nrt_jax.data").joinpath("tulu.jinja").read_text("utf-8")
    else:
        text = _of_tokenizer(tokenizer)
    try:
        render_template(text, QUESTION, tokenizer)
    except BadRow as bad:
        # A template may refuse this conversation and take others.
        error, line = bad.__cause__, ""
        if isinstance(error, jinja2.TemplateSyntaxError):
            line, reason = f"line {error.lineno - _DATE_MACRO.count(chr(10))}: ", error.message
        elif isinstance(error, SyntaxError | RecursionError):
            # Jinja leaves it to Python to find a break outside a loop, and too deep nesting.
            reason = getattr(error, "msg", "nested too deeply")
        else:
            return text
        raise InputError(
            f"{place}: {line}not a Jinja template ({reason}); set data.template=tulu, or "
            "data.template_file to a template that is one"
        ) from error
    return text


def dated(template: str) -> str:
    """The template with a clock that stands at `TODAY`."""
    return _DATE_MACRO + template


def render_template(template: str, messages: Messages, tokenizer: Tokenizer) -> str:
    """What the template makes of `messages` and the header of the next turn.

    Raises BadRow with the template's own words when it refuses them.
    """
    try:
        rendered = tokenizer.fast.apply_chat_template(
            messages, chat_template=dated(template), add_generation_prompt=True, tokenize=False
        )
    except Exception as error:  # a template is a program, and can fail in any way that one can
        reason = " ".join(str(error).split()) or type(error).__name__
        raise BadRow(
            "refused by the template", f"the chat template refuses the row: {reason}"
        ) from error
    assert isinstance(rendered, str), "one conversation, not tokenised"
    return rendered


def _place(config: DataConfig, tokenizer: Tokenizer) -> str:
    """What holds the template, for messages."""
    if config.template_file is not None:
        return str(config.template_file)
    if config.template == "tulu":
        return "the template 'tulu'"
    files = (TEMPLATE_FILE, OLD_TEMPLATE_FILE, SETTINGS_FILE)
    return str(next(path for name in files if (path := tokenizer.directory / name).is_file()))


def _of_tokenizer(tokenizer: Tokenizer) -> str:
    try:
        return tokenizer.fast.get_chat_template()
    except ValueError as error:
        raise InputError(
            f"{tokenizer.directory}: data.template=tokenizer, and the tokenizer has no chat "
            "template; set data.template=tulu, or data.template_file to a template of your own"
        ) from error

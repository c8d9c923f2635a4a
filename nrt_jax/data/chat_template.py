"""From the turns of a conversation to the prompt x, as texts and control tokens."""

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

Messages = list[dict[str, str]]
QUESTION: Messages = [{"role": "user", "content": "1+2"}]


class Prompt(NamedTuple):
    """x of one row."""

    pieces: tuple[int | Text, ...]
    """Texts, and ids of control tokens where these stand."""
    text: str
    """x as one text, without the beginning-of-sequence token in front."""


class PromptTemplate:
    """The template of one config, for one tokenizer.

    plain: x is the question as it is. Else x is what the chat template makes of the turns, with the
    header of the next turn. Raises InputError when the config's template cannot be read.
    """

    def __init__(self, config: DataConfig, tokenizer: Tokenizer):
        self._add_bos = config.add_bos
        self._tokenizer = tokenizer
        self._bos = "" if tokenizer.bos_id is None else tokenizer.token(tokenizer.bos_id)
        self._template = template_text(config, tokenizer)
        self._controls = ControlSplit(tokenizer)

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
        assert self._template is not None, "a plain template takes no turns"
        marked = [turn | {"content": self._controls.mark(turn["content"])} for turn in messages]
        body = render_template(self._template, marked, self._tokenizer).removeprefix(self._bos)
        if self._bos and body.lstrip().startswith(self._bos):
            raise BadRow(
                "begins twice",
                f"the chat template writes {self._bos} twice, or after white space; let it begin "
                "with one or with none",
            )
        pieces = self._controls.split(self._bos + body if self._add_bos else body)
        return Prompt(pieces, unmark(body))


def template_text(config: DataConfig, tokenizer: Tokenizer) -> str | None:
    """The Jinja text of a config's chat template; None for template "plain".

    Raises InputError when there is no template to be had, or one that is not Jinja.
    """
    if config.template == "plain":
        return None
    if config.template_file is not None:
        place = config.template_file
        missing = "set data.template_file to a file"
        with reading(place, "not UTF-8", "save the file as UTF-8", missing):
            text = place.read_text(encoding="utf-8")
    elif config.template == "tulu":
        place = "the template 'tulu'"
        text = resources.files("nrt_jax.data").joinpath("tulu.jinja").read_text("utf-8")
    else:
        files = (TEMPLATE_FILE, OLD_TEMPLATE_FILE, SETTINGS_FILE)
        place = next(path for name in files if (path := tokenizer.directory / name).is_file())
        text = _of_tokenizer(tokenizer)
    try:
        render_template(text, QUESTION, tokenizer)
    except BadRow as bad:
        # A template may refuse this conversation and take others.
        if isinstance(error := bad.__cause__, jinja2.TemplateSyntaxError):
            line = error.lineno - _DATE_MACRO.count("\n")
            raise InputError(
                f"{place}: line {line}: not a Jinja template ({error.message}); set "
                "data.template=tulu, or data.template_file to a template that is one"
            ) from error
    return text


def render_template(template: str, messages: Messages, tokenizer: Tokenizer) -> str:
    """What the template makes of `messages` and the header of the next turn.

    Raises BadRow with the template's own words when it refuses them.
    """
    dated = _DATE_MACRO + template
    try:
        rendered = tokenizer.fast.apply_chat_template(
            messages, chat_template=dated, add_generation_prompt=True, tokenize=False
        )
    except Exception as error:  # a template is a program, and can fail in any way that one can
        reason = " ".join(str(error).split()) or type(error).__name__
        raise BadRow(
            "refused by the template", f"the chat template refuses the row: {reason}"
        ) from error
    assert isinstance(rendered, str), "one conversation, not tokenised"
    return rendered


def _of_tokenizer(tokenizer: Tokenizer) -> str:
    try:
        return tokenizer.fast.get_chat_template()
    except ValueError as error:
        raise InputError(
            f"{tokenizer.directory}: data.template=tokenizer, and the tokenizer has no chat "
            "template; set data.template=tulu, or data.template_file to a template of your own"
        ) from error

"""The fields of both kinds of request: those of OpenAI's interface, and vLLM's beside them.

A field that this server does not implement is taken where its value asks for nothing, and is
otherwise an error that says what to do instead.
"""

from difflib import get_close_matches
from typing import Annotated, Any, Literal, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from nrt_jax.engine.sampling import MAX_STOP_IDS, Sampling
from nrt_jax.serving.detokenize import Shown
from nrt_jax.serving.protocol import bad_request, read_json
from nrt_jax.serving.unsupported import IGNORED, UNSUPPORTED

MAX_STOPS = 16
LEAST_TEMPERATURE = 1e-5
"""Below it logits overflow when they are divided: the most probable token is taken, as at 0."""
LEAST_TOP_P = 1e-6
"""Below it float32 would keep no token: the most probable one is."""

Int32 = Annotated[int, Field(ge=0, lt=2**31)]


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class StreamOptions(_Body):
    """Options of a streamed answer."""

    include_usage: bool = False
    """Whether a last chunk has the numbers of tokens."""
    include_obfuscation: bool = False
    """Changes nothing: chunks are not padded."""
    continuous_usage_stats: Literal[False] = False
    """vLLM's numbers of tokens in every chunk, which are not sent."""


class SamplingFields(_Body):
    """The fields of both kinds of completion."""

    model: str
    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    n: int = Field(default=1, ge=1, le=128)
    best_of: int | None = None
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    """-1 draws one, as without a seed."""
    stop: list[str] = []
    stream: bool = False
    stream_options: StreamOptions | None = None
    # Extensions, with vLLM's names and defaults.
    top_k: int = Field(default=0, ge=-1, lt=2**31)
    min_p: float = Field(default=0.0, ge=0, le=1)
    repetition_penalty: float = Field(default=1.0, gt=0, le=100)
    stop_token_ids: list[int] = Field(default=[], max_length=MAX_STOP_IDS)
    min_tokens: Int32 = 0
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False

    @field_validator("stop", mode="before")
    @classmethod
    def _one_stop(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("stop")
    @classmethod
    def _few_stops(cls, value: list[str]) -> list[str]:
        if len(value) > MAX_STOPS or not all(value):
            raise ValueError(f"must be up to {MAX_STOPS} texts, none of them empty")
        return value

    @field_validator("repetition_penalty")
    @classmethod
    def _penalty_divides(cls, value: float) -> float:
        if value < 0.01:
            raise ValueError("must be 0.01 or more: logits are divided by it")
        return value

    @property
    def drawn_seed(self) -> int | None:
        """The seed; None to draw one."""
        return None if self.seed == -1 else self.seed

    @property
    def shown(self) -> Shown:
        """What the text of an answer shows, and where it ends."""
        return Shown(
            stops=tuple(self.stop),
            keeps_stop=self.include_stop_str_in_output,
            skips_special=self.skip_special_tokens,
            min_tokens=self.min_tokens,
        )

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def sampling(self) -> Sampling:
        """How the engine samples."""
        return Sampling(
            temperature=self.temperature if self.temperature >= LEAST_TEMPERATURE else 0.0,
            top_p=max(self.top_p, LEAST_TOP_P),
            top_k=max(self.top_k, 0),
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            stop_ids=frozenset(self.stop_token_ids),
            ignores_eos=self.ignore_eos,
            min_tokens=self.min_tokens,
            obeys_bans=False,
        )

    def check_stop_ids(self, vocab_size: int) -> None:
        """ApiError 400 for a stop id that is no token."""
        for token in self.stop_token_ids:
            if not 0 <= token < vocab_size:
                raise bad_request("stop_token_ids", f"{token}; token ids are 0 to {vocab_size - 1}")

    def check_min_tokens(self, most: int) -> None:
        """ApiError 400 when fewer tokens than `min_tokens` can be written."""
        if self.min_tokens > most:
            raise bad_request("min_tokens", f"{self.min_tokens}; max_tokens is {most}")


class CompletionRequest(SamplingFields):
    """`POST /v1/completions`."""

    prompt: Any
    max_tokens: int | None = Field(default=None, ge=0)
    logprobs: int | None = Field(default=None, ge=0, le=5)
    echo: bool = False
    add_special_tokens: bool = True
    """Whether a text gets the beginning-of-sequence token that the model's prompts have."""


class ChatRequest(SamplingFields):
    """`POST /v1/chat/completions`."""

    messages: list[Any] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    max_reasoning_tokens: int | None = Field(default=None, ge=1)
    """An extension: a trace of this length is closed."""
    logprobs: bool = False
    top_logprobs: int = Field(default=0, ge=0, le=20)
    chat_template_kwargs: dict[str, Any] = {}

    def check_template_kwargs(self, reasons: bool) -> None:
        """ApiError 400 for what the chat template cannot be told; how it reasons is the model's."""
        for name, value in self.chat_template_kwargs.items():
            if name in ("enable_thinking", "thinking") and value is reasons:
                continue
            remedy = "leave it out"
            if reasons and value is False:
                remedy += "; this model always reasons, max_reasoning_tokens bounds it"
            raise bad_request(
                f"chat_template_kwargs.{name[:40]}", f"is not supported here; {remedy}"
            )


R = TypeVar("R", bound=SamplingFields)
OTHER_PATH: dict[type[SamplingFields], tuple[type[SamplingFields], str]] = {
    CompletionRequest: (ChatRequest, "/v1/chat/completions"),
    ChatRequest: (CompletionRequest, "/v1/completions"),
}


def parse(schema: type[R], body: bytes) -> R:
    """Read a body; ApiError 400 that names the first wrong field."""
    fields = {key: value for key, value in read_json(body).items() if value is not None}
    for name in [name for name in fields if name not in schema.model_fields]:
        if name in UNSUPPORTED:
            UNSUPPORTED[name].check(name, fields.pop(name))
        elif name in IGNORED:
            del fields[name]
    try:
        request = schema.model_validate(fields)
    except ValidationError as error:
        _refuse(error, schema)
    if request.best_of not in (None, request.n):
        raise bad_request("best_of", "is not supported here; leave it out or make it n")
    if request.stream_options is not None and not request.stream:
        raise bad_request("stream_options", "needs stream=true")
    return request


def _refuse(error: ValidationError, schema: type[SamplingFields]) -> NoReturn:
    """ApiError 400 for the first mistake; an unknown field comes before others."""
    details = sorted(error.errors(), key=lambda detail: detail["type"] != "extra_forbidden")
    first = details[0]
    # A name that the client chose may be of any length.
    param = ".".join(str(part)[:60] for part in first["loc"])
    if first["type"] == "extra_forbidden":
        raise bad_request(param, f"is no field of this request; {_suggest(param, schema)}")
    if first["type"] == "missing":
        raise bad_request(param, "is missing; set it")
    if first["type"] == "value_error":
        message = str(first.get("ctx", {}).get("error"))
    else:
        message = first["msg"].replace("Input should ", "must ").replace("List should", "must")
    raise bad_request(param, message)


def _suggest(param: str, schema: type[SamplingFields]) -> str:
    *_, name = param.split(".")
    other, path = OTHER_PATH[schema]
    if param in other.model_fields:
        return f"{path} has it"
    near = get_close_matches(name, schema.model_fields, n=1)
    return f"did you mean {near[0]}?" if near else "leave it out"

"""Fields that clients send and that this server does not implement."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from nrt_jax.serving.protocol import bad_request

IGNORED = frozenset(
    {
        # OpenAI's, which change nothing in what is written.
        "metadata",
        "parallel_tool_calls",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
        "verbosity",
        # vLLM's. The names of special tokens stand without spaces here.
        "cache_salt",
        "request_id",
        "spaces_between_special_tokens",
    }
)


class Unsupported(NamedTuple):
    """The values of a field that ask for nothing, and what to do instead of others."""

    neutral: tuple[Any, ...] = ()
    instead: str = ""

    def check(self, name: str, value: Any) -> None:
        """ApiError 400 for a value that asks for something."""
        if not any(value == neutral for neutral in self.neutral):
            raise bad_request(name, f"is not supported here; leave it out{self.instead}")


_CHECK_FORM = ", and check the form of the answer"
_DESCRIBE = ", and describe what can be called in a message"
_OWN_TEMPLATE = ", and start the server with data.template_file=FILE"
_CONTINUE = ", or send the text to be continued to /v1/completions"

UNSUPPORTED: Mapping[str, Unsupported] = {
    # OpenAI's
    "suffix": Unsupported(("",)),
    "presence_penalty": Unsupported((0,), ", or set repetition_penalty"),
    "frequency_penalty": Unsupported((0,), ", or set repetition_penalty"),
    "logit_bias": Unsupported(({},), ", or bound what is drawn with top_k, top_p or min_p"),
    "tools": Unsupported(([],), _DESCRIBE),
    "tool_choice": Unsupported(("none", "auto"), _DESCRIBE),
    "functions": Unsupported(([],), _DESCRIBE),
    "function_call": Unsupported(("none", "auto"), _DESCRIBE),
    "response_format": Unsupported(({"type": "text"},), _CHECK_FORM),
    "modalities": Unsupported((["text"],)),
    "audio": Unsupported(),
    "prediction": Unsupported(),
    "web_search_options": Unsupported(),
    "reasoning_effort": Unsupported((), ", or set max_reasoning_tokens"),
    # vLLM's
    **dict.fromkeys(
        (
            "guided_json",
            "guided_regex",
            "guided_choice",
            "guided_grammar",
            "guided_decoding_backend",
            "guided_whitespace_pattern",
            "structural_tag",
            "structured_outputs",
        ),
        Unsupported(({}, []), _CHECK_FORM),
    ),
    "use_beam_search": Unsupported((False,), ", or draw several answers with n"),
    "length_penalty": Unsupported((1,)),
    "early_stopping": Unsupported((False,)),
    "truncate_prompt_tokens": Unsupported((), ", and shorten the prompt"),
    "prompt_logprobs": Unsupported((), ", or ask /v1/completions with echo and logprobs"),
    "allowed_token_ids": Unsupported(([],)),
    "bad_words": Unsupported(([],)),
    "logits_processors": Unsupported(([],)),
    "prompt_embeds": Unsupported((), ", and send text or token ids"),
    "detokenize": Unsupported((True,)),
    "return_token_ids": Unsupported((False,)),
    "return_tokens_as_token_ids": Unsupported((False,)),
    "priority": Unsupported((0,)),
    "kv_transfer_params": Unsupported(({},)),
    "mm_processor_kwargs": Unsupported(({},)),
    "media_io_kwargs": Unsupported(({},)),
    "vllm_xargs": Unsupported(({},)),
    # vLLM's, of chats
    "add_generation_prompt": Unsupported((True,), _CONTINUE),
    "continue_final_message": Unsupported((False,), _CONTINUE),
    "add_special_tokens": Unsupported((False,), "; the chat template writes them"),
    "echo": Unsupported((False,)),
    "chat_template": Unsupported((), _OWN_TEMPLATE),
    "documents": Unsupported(([],), ", and put them into a message"),
    "include_reasoning": Unsupported((True,), ", and do not read reasoning_content"),
    "thinking_token_budget": Unsupported((), ", or set max_reasoning_tokens"),
}

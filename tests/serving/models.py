"""A small model to serve: random weights, a byte-level tokenizer, a chat template."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from nrt_jax.checkpoints.abstract_model import Model
from nrt_jax.checkpoints.open import Found, OpenModel
from nrt_jax.config.run import RunConfig
from nrt_jax.config.serving import ServingConfig
from nrt_jax.data.tokenizer import Tokenizer
from nrt_jax.engine.engine import Engine
from nrt_jax.engine.generate import generate
from nrt_jax.engine.requests import Request
from nrt_jax.engine.sampling import Sampling
from nrt_jax.serving.served_model import ServedModel, serve_model
from tests.data.made_tokenizers import write_made_tokenizer
from tests.data.templates import TEMPLATES
from tests.models.tiny import architecture as small
from tests.models.tiny import decoder, mesh

PROMPT, NEW, TRACE = 96, 32, 12
"""Limits of the run in tokens: x, what follows it, a trace."""

TRACE_STOPS = ("e", "!")
"""Tokens that end a trace besides the special ones."""
SLOTS, DECODE_STEPS = 4, 4
"""Of all engines, so that few programs are compiled."""


def make_opened(folder: Path, method: str = "nrt", kind: str = "llama3") -> OpenModel:
    """Nothing was trained: its weights are drawn, so that what it writes is hard to guess."""
    directory = write_made_tokenizer(kind, folder / "tokenizer")
    template = folder / "template.jinja"
    template.write_text(TEMPLATES["llama3" if kind == "llama3" else "mistral"])
    tokenizer = Tokenizer.load(directory)
    architecture = small(vocab_size=tokenizer.vocab_size)
    config = RunConfig.model_validate(
        {
            "method": method,
            "model": {"architecture": architecture.model_dump()},
            "data": {
                "source": "chain_addition",
                "tokenizer": directory,
                "template": "tokenizer",
                "template_file": template,
                "max_prompt_tokens": PROMPT,
                "max_answer_tokens": 8 if method == "nrt" else NEW,
            },
            "rollout": {
                "max_trace_tokens": TRACE,
                "max_response_tokens": NEW,
                "stop_tokens": list(TRACE_STOPS) if kind == "llama3" else [],
            },
        }
    )
    definition, params = nnx.split(decoder(architecture))
    model = Model(definition, architecture, mesh(), target={})
    return OpenModel(
        name="tiny",
        found=Found("run", folder, step=7),
        config=config,
        tokenizer=tokenizer,
        model=model,
        params=params,
    )


def make_served(
    folder: Path, method: str = "nrt", kind: str = "llama3", **settings: Any
) -> ServedModel:
    """The model by the name "tiny"."""
    return serve_model(make_opened(folder, method, kind), ServingConfig(**settings))


class Reference:
    """What a model writes when it is asked for one sequence at a time."""

    def __init__(self, served: ServedModel):
        self.served = served
        self.engine: Engine = served.engine(SLOTS, ServingConfig().top_logprobs)

    def tokens(
        self,
        prompt: list[int],
        limit: int,
        *,
        seed: int = 0,
        stream: int = 0,
        copies: int = 1,
        stop_ids: frozenset[int] = frozenset(),
        **sampling: float,
    ) -> list[tuple[list[int], int | None]]:
        """Each copy's tokens, and the one that ended it."""
        settings = Sampling(**{"temperature": 0.0} | sampling)._replace(stop_ids=stop_ids)
        request = Request(np.array(prompt, np.int32), stream, copies, limit, settings)
        (traces,) = generate(
            self.engine,
            self.served.opened.params,
            [request],
            jax.random.key(seed),
            steps=DECODE_STEPS,
        )
        return [(trace.tokens.tolist(), trace.end_token) for trace in traces]

    def text(self, prompt: list[int], limit: int, **options: Any) -> str:
        """One copy's text."""
        ((tokens, _),) = self.tokens(prompt, limit, **options)
        return self.served.tokenizer.decode(tokens)

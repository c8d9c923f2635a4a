"""Settings of `nrt-jax serve`."""

from pydantic import Field, model_validator

from nrt_jax.config.load import MOST_SLOTS, MOST_TOKENS, ConfigPath, Section


class ServingConfig(Section):
    """`nrt-jax serve MODEL [field=value ...]`: where it listens, and how much it accepts."""

    host: str = Field(default="127.0.0.1", min_length=1)
    """Address of both servers. One that other machines reach, such as 0.0.0.0, needs a key or
    insecure=true."""
    port: int = Field(default=8000, ge=0, le=65535)
    """Port of the HTTP server; 0 takes a free one, which the first line of output names."""
    grpc_port: int | None = Field(default=9000, ge=0, le=65535)
    """Port of JetStream's gRPC server; 0 takes a free one, null starts none. Without the package
    (pip install 'nrt-jax[jetstream]') the default starts none."""
    api_key_file: ConfigPath | None = None
    """File of API keys, one per line or separated by commas. Requests must then send one, as
    `Authorization: Bearer KEY`."""
    api_key_env: str | None = Field(default=None, min_length=1)
    """Name of an environment variable that holds API keys, separated by commas; its keys are
    added to those of api_key_file."""
    insecure: bool = False
    """Whether a host that other machines reach may be served without a key."""
    ssl_certfile: ConfigPath | None = None
    """Certificate chain in PEM, for TLS on both servers; null for no TLS."""
    ssl_keyfile: ConfigPath | None = None
    """Private key of the certificate in PEM, not encrypted."""
    name: str | None = Field(default=None, min_length=1)
    """What requests call the model; null for the name of its directory."""
    slots: int = Field(default=16, ge=1, le=MOST_SLOTS)
    """Sequences that the HTTP server decodes at the same time."""
    decode_steps: int = Field(default=8, ge=1, le=1024)
    """Tokens that are decoded and streamed together; more raise the throughput."""
    grpc_slots: int = Field(default=4, ge=1, le=MOST_SLOTS)
    """Sequences that the gRPC server decodes at the same time, in a cache of their own."""
    max_prompt_tokens: int | None = Field(default=None, ge=1, le=MOST_TOKENS)
    """Longest prompt of a chat, beginning-of-sequence token included; null for the
    model's data.max_prompt_tokens."""
    max_new_tokens: int | None = Field(default=None, ge=1, le=MOST_TOKENS)
    """Most tokens written after a prompt, for a chat t_start, trace, t_end and answer together;
    null for the model's rollout.max_response_tokens, or data.max_answer_tokens if it does not
    reason."""
    top_logprobs: int = Field(default=5, ge=0, le=20)
    """Most alternatives per token whose logprobs a request may ask for."""
    max_sequences: int = Field(default=128, ge=1)
    """Most sequences of one request: its prompts times n."""
    max_concurrent_requests: int = Field(default=64, ge=1)
    """Requests answered at the same time."""
    queue: int = Field(default=256, ge=0)
    """Further requests that may wait; those beyond are refused with status 429."""
    grpc_queue: int = Field(default=64, ge=1)
    """gRPC requests running or waiting; those beyond are refused with RESOURCE_EXHAUSTED."""
    max_body_bytes: int = Field(default=4 * 1024 * 1024, ge=1024)
    """Largest body of a request, in bytes."""
    request_timeout_s: float = Field(default=600.0, gt=0)
    """Seconds after which a request without an answer ends with status 504, or over gRPC with
    DEADLINE_EXCEEDED."""
    drain_s: float = Field(default=30.0, ge=0)
    """Seconds after SIGTERM in which running requests may end; a second SIGTERM cuts them off."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Seed from which the seeds of requests without one are drawn."""

    @model_validator(mode="after")
    def _both_tls_files(self) -> "ServingConfig":
        if (self.ssl_certfile is None) != (self.ssl_keyfile is None):
            raise ValueError("ssl_certfile and ssl_keyfile: set both, or neither")
        return self

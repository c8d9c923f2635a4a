"""Who may ask: API keys, the addresses that need one, and TLS files.

No key is kept, shown or logged: only its SHA-256 digest is in memory.
"""

import hashlib
import hmac
import ipaddress
import logging
import os
import socket
import ssl
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qsl

from starlette.types import ASGIApp, Receive, Scope, Send

from nrt_jax.config.serving import ServingConfig
from nrt_jax.errors import InputError
from nrt_jax.serving.protocol import ApiError, error_response

log = logging.getLogger(__name__)

OPEN_PATHS = frozenset(["/health"])
"""Answered without a key, for probes."""
MAX_FILE_BYTES = 1 << 20
URL_NAMES = frozenset(["api_key", "apikey", "key", "token", "access_token", "authorization"])
"""Names of parameters in which clients send a key, with `-` as `_`."""


# --- keys ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Keys:
    """The keys of a server, as digests."""

    digests: tuple[bytes, ...] = field(repr=False)

    def allow(self, authorization: Sequence[bytes]) -> bool:
        """Whether these values of the header are one, `Bearer KEY`, with a key of the server."""
        if len(authorization) != 1:
            return False
        scheme, _, key = authorization[0].strip().partition(b" ")
        return scheme.lower() == b"bearer" and self.has(key.strip())

    def has(self, key: bytes) -> bool:
        """Whether it is a key; the time does not tell which, nor how much of it is right."""
        digest, found = hashlib.sha256(key).digest(), False
        for known in self.digests:
            found |= hmac.compare_digest(digest, known)
        return found


def load_keys(config: ServingConfig) -> Keys | None:
    """The keys of `api_key_file` and of `api_key_env`; None when neither is set.

    Raises InputError for a file that cannot be read, for a variable that is not set, for a text
    that is no key, and for a source without keys.
    """
    keys: list[str] = []
    if config.api_key_file is not None:
        name = f"api_key_file={config.api_key_file}"
        _warn_if_public(config.api_key_file, name)
        try:
            text = _read(config.api_key_file, name).decode("utf-8-sig")
        except UnicodeDecodeError:
            raise InputError(f"{name}: is not text in UTF-8; write one key per line") from None
        keys += _split(text, name)
    if config.api_key_env is not None:
        # Not by its name: some take the field for the key itself.
        name = "api_key_env"
        text = os.environ.get(config.api_key_env)
        if text is None:
            raise InputError(
                f"{name}: the environment has no variable of this name; export it, or name another"
            )
        keys += _split(text, name)
    if not keys:
        return None
    return Keys(tuple(hashlib.sha256(key.encode("ascii")).digest() for key in dict.fromkeys(keys)))


def _split(text: str, name: str) -> list[str]:
    keys = []
    for number, line in enumerate(text.split("\n"), 1):
        for key in filter(None, (part.strip() for part in line.split(","))):
            if not all("!" <= letter <= "~" for letter in key):
                raise InputError(
                    f"{name}: line {number}: a key has printable ASCII characters without spaces; "
                    "separate keys by commas or lines"
                )
            keys.append(key)
    if not keys:
        raise InputError(f"{name}: has no key; write one per line, or separate them by commas")
    return keys


def unauthorized(reason: str, *, presented: bool) -> ApiError:
    """Status 401 as OpenAI's clients expect it."""
    challenge = 'Bearer realm="nrt-jax"' + (', error="invalid_token"' if presented else "")
    return ApiError(401, reason, code="invalid_api_key", headers={"WWW-Authenticate": challenge})


class Guard:
    """Middleware that answers 401 to every request without a key, but for `OPEN_PATHS`."""

    def __init__(self, app: ASGIApp, keys: Keys):
        self._app, self._keys = app, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        error = self._refusal(scope)
        if error is None:
            await self._app(scope, receive, send)
        else:
            await error_response(error)(scope, receive, send)

    def _refusal(self, scope: Scope) -> ApiError | None:
        if scope["path"] in OPEN_PATHS:
            return None
        sent = [value for name, value in scope["headers"] if name == b"authorization"]
        if self._in_url(scope["query_string"]):
            return unauthorized(
                "a key must not be in the URL, which logs keep; "
                "send it in the header 'Authorization: Bearer KEY'",
                presented=bool(sent),
            )
        if not sent:
            return unauthorized(
                "no API key; send one in the header 'Authorization: Bearer KEY'", presented=False
            )
        if not self._keys.allow(sent):
            return unauthorized(
                "the API key is not one of this server's; send 'Authorization: Bearer KEY' once",
                presented=True,
            )
        return None

    def _in_url(self, query: bytes) -> bool:
        return any(
            name.lower().replace("-", "_") in URL_NAMES or self._keys.has(value.encode("latin-1"))
            for name, value in parse_qsl(query.decode("latin-1"), True, encoding="latin-1")
        )


# --- addresses -----------------------------------------------------------------------------------


class Address(NamedTuple):
    """What `host` resolves to; both servers listen on it."""

    family: socket.AddressFamily
    host: str
    """Numeric."""

    @property
    def in_url(self) -> str:
        """With brackets around IPv6."""
        return f"[{self.host}]" if ":" in self.host else self.host

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine reaches it."""
        address = ipaddress.ip_address(self.host.partition("%")[0])
        mapped = getattr(address, "ipv4_mapped", None)
        return (mapped or address).is_loopback


def resolve(config: ServingConfig, keys: Keys | None) -> Address:
    """The address of `host`.

    Raises InputError for a host without one, and for one that others reach when there is neither a
    key nor `insecure`.
    """
    try:
        family, _, _, _, found = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM
        )[0]
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "is no name of a host"
        raise InputError(
            f"port={config.port}: {reason} on host={config.host}; choose another"
        ) from None
    address = Address(family, str(found[0]))
    if address.is_loopback:
        return address
    if keys is None and not config.insecure:
        raise InputError(
            f"host={config.host}: others reach this address, and no key is asked for; "
            "set api_key_file or api_key_env, or insecure=true if something else protects it"
        )
    if keys is None:
        log.warning("host=%s: whoever reaches it may ask, as insecure=true says", config.host)
    elif config.ssl_certfile is None:
        log.warning(
            "host=%s: keys and texts travel unencrypted; set ssl_certfile and ssl_keyfile, or put "
            "a proxy with TLS in front",
            config.host,
        )
    return address


# --- TLS -----------------------------------------------------------------------------------------


class Tls(NamedTuple):
    """A certificate chain and its key, which belong together."""

    certfile: Path
    keyfile: Path
    certificate: bytes
    key: bytes


def load_tls(config: ServingConfig) -> Tls | None:
    """The files of `ssl_certfile` and `ssl_keyfile`; None when they are not set.

    Raises InputError for files that cannot be read, that are not PEM, that do not belong together,
    and for a key that is encrypted.
    """
    if config.ssl_certfile is None or config.ssl_keyfile is None:
        return None
    cert_name, key_name = f"ssl_certfile={config.ssl_certfile}", f"ssl_keyfile={config.ssl_keyfile}"
    certificate, key = _read(config.ssl_certfile, cert_name), _read(config.ssl_keyfile, key_name)
    if b"-----BEGIN CERTIFICATE-----" not in certificate:
        raise InputError(f"{cert_name}: has no certificate in PEM; name the certificate chain")
    if b"PRIVATE KEY-----" not in key:
        raise InputError(f"{key_name}: has no private key in PEM; name the certificate's key")
    if b"ENCRYPTED" in key:
        raise InputError(
            f"{key_name}: is encrypted, and nobody can type its passphrase here; "
            "write it without one: openssl pkey -in OLD -out NEW"
        )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(config.ssl_certfile, config.ssl_keyfile, password="")
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise InputError(
                f"{key_name}: is not the key of {cert_name}; name two files that belong together"
            ) from None
        reason = (error.reason or "not PEM").lower().replace("_", " ")
        raise InputError(
            f"{cert_name}, {key_name}: cannot be used: {reason}; name a valid pair"
        ) from None
    _warn_if_public(config.ssl_keyfile, key_name)
    return Tls(config.ssl_certfile, config.ssl_keyfile, certificate, key)


# --- files ---------------------------------------------------------------------------------------


def _read(path: Path, name: str) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise InputError(f"{name}: {error.strerror or error}; name a file to read") from None
    if len(content) > MAX_FILE_BYTES:
        raise InputError(f"{name}: is larger than {MAX_FILE_BYTES} bytes; name another file")
    return content


def _warn_if_public(path: Path, name: str) -> None:
    try:
        mode = path.stat().st_mode
    except OSError:
        return  # `_read` says why
    if stat.S_ISREG(mode) and mode & (stat.S_IROTH | stat.S_IWOTH):
        log.warning("%s: every user of this machine can read or write it; chmod 600 %s", name, path)

"""Keys, addresses that need one, TLS files: what is accepted, refused, warned about and hidden."""

import contextlib
import hashlib
import http.client
import itertools
import json
import logging
import ssl

import pytest

from nrt_jax.config.serving import ServingConfig
from nrt_jax.errors import InputError
from nrt_jax.serving.access import Keys, load_keys, load_tls, resolve
from nrt_jax.serving.server import make_server
from tests.serving.conftest import SETTINGS
from tests.serving.live import listening
from tests.serving.tls_files import openssl, write_pair

KEYS = ("first-key", "second~key/+=")
PATHS = (
    "/v1/models",
    "/v1/models/tiny",
    "/metrics",
    "/openapi.json",
    "/none",
    "/health/",
    "//health",
)


@pytest.fixture
def key_file(tmp_path):
    path = tmp_path / "keys"
    path.write_text("\n".join(KEYS) + "\n")
    path.chmod(0o600)
    return path


@pytest.fixture(scope="module")
def guarded(served, tmp_path_factory):
    path = tmp_path_factory.mktemp("guarded") / "keys"
    path.write_text(",".join(KEYS))
    with listening(make_server(served, ServingConfig(**SETTINGS, api_key_file=path))) as live:
        yield live


def ask(live, path: str, *authorization: str | bytes, method: str = "GET", body=None):
    """Status, headers, body."""
    connection = http.client.HTTPConnection("127.0.0.1", live.port, timeout=60)
    with contextlib.closing(connection):
        connection.putrequest(method, path)
        for value in authorization:
            connection.putheader("Authorization", value)
        if body is not None:
            connection.putheader("Content-Length", str(len(body)))
        connection.endheaders(body)
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read()


# --- requests -------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
def test_every_key_is_accepted(guarded, key, scheme):
    assert ask(guarded, "/v1/models", f"{scheme} {key}")[0] == 200


def test_a_completion_with_a_key(guarded):
    body = json.dumps({"model": "tiny", "prompt": "a", "max_tokens": 2}).encode()
    path = "/v1/completions"
    assert ask(guarded, path, f"Bearer {KEYS[0]}", method="POST", body=body)[0] == 200
    assert ask(guarded, path, method="POST", body=body)[0] == 401


@pytest.mark.parametrize("path", PATHS)
def test_all_paths_but_the_health_check_want_a_key(guarded, path):
    status, headers, body = ask(guarded, path)
    assert status == 401
    assert headers["www-authenticate"] == 'Bearer realm="nrt-jax"'
    assert "x-request-id" in headers
    error = json.loads(body)["error"]
    assert error == {
        "message": "no API key; send one in the header 'Authorization: Bearer KEY'",
        "type": "invalid_request_error",
        "param": None,
        "code": "invalid_api_key",
    }
    assert ask(guarded, "/health")[0] == 200


@pytest.mark.parametrize(
    "authorization",
    [
        ("",),
        ("Bearer",),
        ("Bearer ",),
        ("Basic first-key",),
        ("first-key",),
        ("Bearer first-ke",),
        ("Bearer first-keyy",),
        ("Bearer first-key,second~key/+=",),
        ("Bearer FIRST-KEY",),
        ("Bearer wrong", "Bearer first-key"),
        ("Bearer first-key", "Bearer first-key"),
        ("Bearer sch\u00fcssel".encode(),),
        (b"Bearer \xff\xfe\x80",),
        ("Bearer " + "k" * 30_000,),
    ],
)
def test_wrong_headers(guarded, authorization, caplog):
    status, headers, body = ask(guarded, "/v1/models", *authorization)
    assert status == 401
    assert headers["www-authenticate"] == 'Bearer realm="nrt-jax", error="invalid_token"'
    assert json.loads(body)["error"]["code"] == "invalid_api_key"
    assert not caplog.records


def test_a_header_beyond_what_http_takes_is_an_answer_too(guarded):
    # The connection may be closed before all of it is written.
    with contextlib.suppress(ConnectionError):
        assert 400 <= ask(guarded, "/v1/models", "Bearer " + "k" * 500_000)[0] < 500
    assert ask(guarded, "/v1/models", f"Bearer {KEYS[0]}")[0] == 200


@pytest.mark.parametrize(
    "query",
    [
        "api_key=first-key",
        "api-key=other",
        "q=first-key",
        "token=x",
        "a=1&API_KEY=",
        "x=first%2Dkey",
    ],
)
@pytest.mark.parametrize("header", [(), (f"Bearer {KEYS[0]}",)])
def test_a_key_in_the_url_is_refused(guarded, query, header):
    status, _, body = ask(guarded, f"/v1/models?{query}", *header)
    assert status == 401
    assert "must not be in the URL" in json.loads(body)["error"]["message"]


def test_other_queries_are_ignored(guarded):
    assert ask(guarded, "/v1/models?limit=3&%ff=%fe", f"Bearer {KEYS[0]}")[0] == 200


def test_the_openai_client_sends_the_key(guarded):
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=guarded.url, api_key=KEYS[1], max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["tiny"]
    with (
        openai.OpenAI(base_url=guarded.url, api_key="wrong", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError, match="not one of this server's"),
    ):
        client.models.list()


def test_no_answer_and_no_figure_holds_a_key(guarded):
    texts = [ask(guarded, path, f"Bearer {KEYS[0]}")[2] for path in (*PATHS, "/health")]
    assert not any(key.encode() in text for key, text in itertools.product(KEYS, texts))
    assert guarded.metric("nrt_requests_total", route="/v1/models", status="401") > 0


def test_without_keys_all_are_served(live):
    assert ask(live, "/v1/models")[0] == 200
    assert ask(live, "/v1/models?api_key=x", "Bearer x")[0] == 200


def test_every_key_is_compared(monkeypatch):
    compared = []

    def digest(left, right):
        compared.append(right)
        return left == right

    monkeypatch.setattr("nrt_jax.serving.access.hmac.compare_digest", digest)
    first = hashlib.sha256(b"first").digest()
    keys = Keys((first, b"2", b"3"))
    assert keys.has(b"first")
    assert compared == [first, b"2", b"3"]
    assert not keys.has(b"x")
    assert compared[3:] == [first, b"2", b"3"]
    assert repr(keys) == "Keys()"


# --- where keys come from -------------------------------------------------------------------------


def test_keys_of_a_file_and_of_the_environment(tmp_path, monkeypatch, caplog):
    path = tmp_path / "keys"
    path.write_bytes(b"\xef\xbb\xbffirst-key\r\n\r\n  second , third,,\n")
    path.chmod(0o600)
    monkeypatch.setenv("SOME_KEYS", "fourth,first-key")
    keys = load_keys(ServingConfig(api_key_file=path, api_key_env="SOME_KEYS"))
    assert len(keys.digests) == 4
    assert all(keys.has(key) for key in (b"first-key", b"second", b"third", b"fourth"))
    assert not keys.has(b"")
    assert not caplog.records
    assert load_keys(ServingConfig()) is None


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "has no key; write one per line"),
        (b" \n,\r\n , \n", "has no key; write one per line"),
        (b"good\nhas space\n", "line 2: a key has printable ASCII"),
        ("s3cret-\u00fc".encode(), "line 1: a key has printable ASCII"),
        (b"s3cret\0", "line 1: a key has printable ASCII"),
        (b"\xff\xfes\x003\x00", "is not text in UTF-8"),
        (b"k" * (1 << 21), "is larger than 1048576 bytes"),
    ],
)
def test_files_without_keys(tmp_path, content, said):
    path = tmp_path / "keys"
    path.write_bytes(content)
    with pytest.raises(InputError) as refused:
        load_keys(ServingConfig(api_key_file=path))
    message = str(refused.value)
    assert message.startswith(f"api_key_file={path}: {said}")
    assert "\n" not in message
    assert "s3cret" not in message.removeprefix(f"api_key_file={path}")


def test_sources_that_are_not_there(tmp_path, monkeypatch):
    for path, said in ((tmp_path / "none", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(InputError, match=said):
            load_keys(ServingConfig(api_key_file=path))
    monkeypatch.delenv("s3cret", raising=False)
    with pytest.raises(InputError, match="no variable of this name") as refused:
        load_keys(ServingConfig(api_key_env="s3cret"))
    # Some take the field for the key itself.
    assert "s3cret" not in str(refused.value)
    monkeypatch.setenv("EMPTY", "")
    with pytest.raises(InputError, match="has no key"):
        load_keys(ServingConfig(api_key_env="EMPTY"))


@pytest.mark.parametrize(("mode", "warned"), [(0o600, 0), (0o640, 0), (0o644, 1), (0o606, 1)])
def test_a_key_file_that_everybody_reads(key_file, mode, warned, caplog):
    key_file.chmod(mode)
    with caplog.at_level(logging.WARNING):
        load_keys(ServingConfig(api_key_file=key_file))
    assert len(caplog.records) == warned
    assert caplog.text.count("chmod 600") == warned
    assert not any(key in caplog.text for key in KEYS)


# --- addresses ------------------------------------------------------------------------------------

LOOPBACK = ("127.0.0.1", "127.0.0.9", "127.1", "localhost", "::ffff:127.0.0.1")
OTHERS = ("0.0.0.0", "0", "192.0.2.7", "::ffff:192.0.2.7", "::", "2001:db8::1")


def resolved(host: str, keys: Keys | None = None, **settings):
    try:
        return resolve(ServingConfig(host=host, **settings), keys)
    except InputError as error:
        if "others reach" in str(error):
            raise
        pytest.skip(str(error))


@pytest.mark.parametrize("host", [*LOOPBACK, "::1"])
def test_loopback_needs_no_key(host, caplog):
    assert resolved(host).is_loopback
    assert not caplog.records


@pytest.mark.parametrize("host", OTHERS)
def test_other_addresses_need_a_key_or_insecure(host, caplog):
    with pytest.raises(InputError, match="others reach this address, and no key is asked for"):
        resolved(host)
    with caplog.at_level(logging.WARNING):
        resolved(host, insecure=True)
        assert "whoever reaches it may ask" in caplog.text
        caplog.clear()
        resolved(host, Keys((b"1",)))
        assert "travel unencrypted" in caplog.text


@pytest.mark.parametrize("host", ["nowhere.invalid", "a" * 70, "b\u00fccher..de"])
def test_hosts_without_an_address(host):
    with pytest.raises(InputError) as refused:
        resolve(ServingConfig(host=host), None)
    assert str(refused.value).endswith(f"on host={host}; choose another")


# --- TLS ------------------------------------------------------------------------------------------


def test_answers_over_tls(served, tmp_path):
    certificate, key = write_pair(tmp_path)
    settings = SETTINGS | {"ssl_certfile": certificate, "ssl_keyfile": key}
    config = ServingConfig(**settings)
    tls = load_tls(config)
    options = {"ssl_certfile": tls.certfile, "ssl_keyfile": tls.keyfile}
    with listening(make_server(served, config), **options) as live:
        trusting = ssl.create_default_context(cafile=str(certificate))
        connection = http.client.HTTPSConnection("127.0.0.1", live.port, context=trusting)
        with contextlib.closing(connection):
            connection.request("GET", "/health")
            assert connection.getresponse().status == 200


@pytest.fixture
def pair(tmp_path):
    return write_pair(tmp_path)


def refused_tls(certificate, key) -> str:
    with pytest.raises(InputError) as refused:
        load_tls(ServingConfig(ssl_certfile=certificate, ssl_keyfile=key))
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_tls_files_that_cannot_be_used(pair, tmp_path):
    certificate, key = pair
    other, _ = write_pair(tmp_path, "other")
    assert f"ssl_certfile={tmp_path / 'none'}: No such file" in refused_tls(tmp_path / "none", key)
    assert f"ssl_keyfile={tmp_path}: Is a directory" in refused_tls(certificate, tmp_path)
    assert f"ssl_keyfile={key}: is not the key of ssl_certfile={other}" in refused_tls(other, key)
    assert "has no private key in PEM" in refused_tls(certificate, certificate)
    assert "has no certificate in PEM" in refused_tls(key, key)
    broken = tmp_path / "broken"
    broken.write_bytes(b"-----BEGIN CERTIFICATE-----\n!!!\n-----END CERTIFICATE-----\n")
    assert "cannot be used" in refused_tls(broken, key)
    broken.write_bytes(certificate.read_bytes()[:-80])
    assert "cannot be used" in refused_tls(broken, key)


@pytest.mark.parametrize("form", [("pkcs8", "-topk8"), ("ec", "-aes256")])
def test_an_encrypted_key_is_refused_without_a_question(pair, tmp_path, form):
    certificate, key = pair
    encrypted = tmp_path / "encrypted"
    openssl(*form, "-in", str(key), "-out", str(encrypted), "-passout", "pass:x")
    assert f"ssl_keyfile={encrypted}: is encrypted" in refused_tls(certificate, encrypted)


def test_a_private_key_that_everybody_reads(pair, caplog):
    certificate, key = pair
    key.chmod(0o644)
    with caplog.at_level(logging.WARNING):
        assert load_tls(ServingConfig(ssl_certfile=certificate, ssl_keyfile=key)) is not None
    assert f"chmod 600 {key}" in caplog.text


def test_one_tls_file_is_not_enough():
    with pytest.raises(ValueError, match="set both, or neither"):
        ServingConfig(ssl_certfile="x")

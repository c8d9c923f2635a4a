"""JetStream on our engine: the adapter to its interface, and the driver of its threads.

google-jetstream 0.2.2 is an extra, `pip install 'nrt-jax[jetstream]'`. Only this file and
jetstream_grpc.py import it, and importing them raises ModuleNotFoundError without it. What the
package does, and what is done about it here:

- Its token utilities import two names from seqio, which brings TensorFlow (2.7 GB). Nothing here
  calls them: stand-ins are imported where seqio is missing.
- Importing its orchestrator sets the root logger to DEBUG and adds a handler; both are undone.
- It calls `jax.tree_map`, which jax no longer has.
- Its threads answer any exception with SIGKILL of the process. Here the driver's owner is told.
- It prepends a beginning-of-sequence token to token ids and cuts the head of a long prompt. Here
  prompts run as they are, and their length is checked before.
- It drops logprobs, and the token that ended a sequence; both are returned here.
- It asserts that some slot is in use, although the last sequences may have ended a moment before.
- Its `stop` waits for its threads without end, and leaves those running that were started before
  one could not be. `end` is used instead.
"""

import contextlib
import importlib
import importlib.util
import logging
import queue
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Int, Key

from nrt_jax.engine.decode_state import (
    DecodeState,
    Sampled,
    SlotRequests,
    padded,
    slot_sampling,
)
from nrt_jax.engine.engine import Engine
from nrt_jax.engine.prefill import Prefix
from nrt_jax.engine.programs import launched_in_order
from nrt_jax.engine.sampling import Sampling
from nrt_jax.models.sharding import replicated
from nrt_jax.serving.engine_loop import STOP_S

log = logging.getLogger(__name__)


@contextlib.contextmanager
def _stand_in_for_seqio() -> Iterator[None]:
    """Where seqio is missing, offer the two class names that JetStream imports from it."""
    if importlib.util.find_spec("seqio") is not None:
        yield
        return
    vocabularies = types.ModuleType("seqio.vocabularies")
    for name in ("Vocabulary", "SentencePieceVocabulary"):
        setattr(vocabularies, name, type(name, (), {}))
    stand_ins = {"seqio": types.ModuleType("seqio"), "seqio.vocabularies": vocabularies}
    sys.modules.update(stand_ins)
    try:
        yield
    finally:
        # Code that asks whether seqio is installed must get the true answer.
        for name in stand_ins:
            del sys.modules[name]


def import_quietly(name: str) -> types.ModuleType:
    """Import a module of JetStream, and leave the root logger as it was."""
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    try:
        with _stand_in_for_seqio():
            return importlib.import_module(name)
    finally:
        root.setLevel(level)
        root.handlers[:] = handlers


_engine_api = import_quietly("jetstream.engine.engine_api")
_tokenizer_pb2 = import_quietly("jetstream.engine.tokenizer_pb2")
orchestrator = import_quietly("jetstream.core.orchestrator")


# The adapter


class Start(NamedTuple):
    """What a sequence needs besides its prompt; JetStream's interface has no field for it."""

    key: Key[Array, ""]
    limit: int
    sampling: Sampling


class Prefilled(NamedTuple):
    """A prompt after prefill, and the request of the one sample that continues it."""

    prefix: Prefix
    request: SlotRequests
    """Its slot is not known yet."""


@struct.dataclass
class SampledTokens(_engine_api.ResultTokens):
    """ResultTokens with two more columns: the bits of the logprob, and whether the slot is done."""

    def convert_to_numpy(self) -> "SampledTokens":
        """The same columns on the host."""
        return self.replace(data=np.asarray(self.data))


class JetStreamEngine(_engine_api.Engine):
    """Our engine behind JetStream's interface; it wants an engine whose slots share no prompt.

    A sequence is greedy and goes on to the engine's limit, unless `announce` says otherwise.
    """

    def __init__(self, engine: Engine):
        self._engine = engine
        columns = jax.jit(_columns, out_shardings=replicated(engine.mesh))
        self._columns = launched_in_order(columns, engine.mesh)
        self._announced: Start | None = None
        self._allocated: DecodeState | None = None

    def announce(self, start: Start) -> None:
        """Say how the sequence of the next prefill is sampled; called in the prefill thread."""
        self._announced = start

    def prefill(
        self,
        *,
        params: Any,
        existing_prefix: Prefilled | None = None,
        padded_tokens: Int[Array | np.ndarray, "S"],
        true_length: int,
    ) -> Prefilled:
        """Run one prompt, or the next part after a prefix."""
        greedy = Start(
            jax.random.key(0),
            self._engine.max_new_tokens,
            Sampling(temperature=0.0, obeys_bans=False),
        )
        start, self._announced = self._announced or greedy, None
        prefix = self._engine.prefill(
            params=params,
            existing_prefix=None if existing_prefix is None else existing_prefix.prefix,
            padded_tokens=padded_tokens,
            true_length=true_length,
        )
        request = SlotRequests(
            slot_K=np.full(1, -1, np.int32),
            row_K=np.zeros(1, np.int32),
            prompt=0,
            key_K=start.key[None],
            limit_K=np.asarray([start.limit], np.int32),
            sampling=slot_sampling([start.sampling]),
        )
        return Prefilled(prefix, request)

    def insert(self, prefix: Prefilled, decode_state: DecodeState, slot: int) -> DecodeState:
        """Start the sequence in `slot`; the state passed in is consumed."""
        request = prefix.request._replace(slot_K=np.asarray([slot], np.int32), prompt=slot)
        return self._engine.insert(prefix.prefix, decode_state, request)

    def generate(self, params: Any, decode_state: DecodeState) -> tuple[DecodeState, SampledTokens]:
        """Draw one token in every slot; the state passed in is consumed."""
        decode_state, sampled = self._engine.generate(params, decode_state)
        return decode_state, SampledTokens(
            data=self._columns(decode_state.generated_B, sampled),
            tokens_idx=(0, 1),
            valid_idx=(1, 2),
            length_idx=(2, 3),
            samples_per_slot=1,
        )

    def allocate(self) -> None:
        """Make the next decode state now: a lack of memory is then raised here, not in a thread."""
        self._allocated = None
        self._allocated = self._engine.init_decode_state()

    def init_decode_state(self) -> DecodeState:
        """An empty state with a prompt slot for every slot."""
        state, self._allocated = self._allocated, None
        return self._engine.init_decode_state() if state is None else state

    def load_params(self, params: Any) -> Any:
        """The weights as they are."""
        return params

    def get_prefix_destination_sharding(self) -> Any:
        """Every device holds a whole prefix until it is inserted."""
        return replicated(self._engine.mesh)

    def get_tokenizer(self) -> Any:
        """Empty parameters: prompts and results are token ids."""
        return _tokenizer_pb2.TokenizerParameters()

    def build_tokenizer(self, metadata: Any) -> None:
        """None is needed."""

    @property
    def max_concurrent_decodes(self) -> int:
        """Number of slots."""
        return self._engine.max_concurrent_decodes

    @property
    def samples_per_slot(self) -> int:
        """One sequence per slot."""
        return 1

    @property
    def max_prefill_length(self) -> int:
        """Longest prompt in tokens, a bucket."""
        return self._engine.max_prefill_length

    @property
    def mesh(self) -> jax.sharding.Mesh:
        """The mesh of the weights and of the cache."""
        return self._engine.mesh

    @property
    def colocated_cpus(self) -> None:
        """None are used."""
        return None


def _columns(generated_B: Int[Array, "B"], sampled: Sampled) -> Int[Array, "B 5"]:
    """One step as the columns of JetStream's results, and the two of `SampledTokens`."""
    bits_B = jax.lax.bitcast_convert_type(sampled.logprobs[0], jnp.int32)
    columns = (sampled.tokens[0], sampled.count_B, generated_B, bits_B, sampled.done_B)
    return jnp.stack([column.astype(jnp.int32) for column in columns], axis=1)


# The driver


class DrawnToken(NamedTuple):
    """A token of a sequence, the one that ended it included."""

    token: int
    logprob: float


@dataclass
class ActiveRequest(orchestrator.ActiveRequest):
    """A sequence in the orchestrator.

    `max_tokens` may be lowered while it runs, to free its slot.
    """

    return_channel: Any
    """Its `add_result` gets the list of DrawnTokens of each step, then `close` is called."""
    prefill_content: Any = None
    """Ids of the prompt, [S]."""
    start: Start | None = None


class _Thread(threading.Thread):
    """Replaces JetThread: passes an exception to the driver that the thread belongs to."""

    def __init__(self, target: Any, name: str, daemon: bool = True):
        super().__init__(target=target, name=name, daemon=True)
        self._driver: Driver = target.func.__self__

    def run(self) -> None:
        """Work until the driver stops or the thread fails."""
        try:
            super().run()
        except BaseException as error:
            # Whatever it is: requests would wait for a thread that has ended.
            self._driver.failed(error)


def _delete(prefilled: Prefilled) -> None:
    for leaf in jax.tree.leaves(prefilled):
        if isinstance(leaf, jax.Array):
            leaf.delete()


def _process_result_tokens(
    *, slot: int, slot_max_length: int, result_tokens: SampledTokens, complete: np.ndarray, **_: Any
) -> tuple[list[DrawnToken], np.ndarray]:
    """The slot's token of one step, if it drew one, and whether its sequence is complete."""
    row = np.asarray(result_tokens.data)[slot]
    token, valid, length, bits, done = row
    if not valid or length > slot_max_length:
        return [], np.ones_like(complete)
    return [DrawnToken(int(token), float(bits.view(np.float32)))], complete | bool(done)


vars(orchestrator).update(
    JetThread=_Thread,
    delete_pytree=_delete,
    token_utils=types.SimpleNamespace(process_result_tokens=_process_result_tokens),
)


class Driver(orchestrator.Driver):
    """JetStream's threads around one engine, from its construction to `end`.

    `on_failure(driver, error)` is called once, in the first thread that fails.
    """

    def __init__(
        self,
        engine: JetStreamEngine,
        params: Any,
        on_failure: "Callable[[Driver, BaseException], object]",
    ):
        self._on_failure = on_failure
        self._ending = threading.Lock()
        try:
            super().__init__(
                prefill_engines=[engine],
                generate_engines=[engine],
                prefill_params=[params],
                generate_params=[params],
                interleaved_mode=True,
                jax_padding=False,
            )
        except RuntimeError:
            self.end()  # a thread could not be started, but those before it were
            raise

    def failed(self, error: BaseException) -> None:
        """Report an exception; called in the thread that raised it."""
        # A driver that ends empties the queues that its threads work on, which may then raise.
        if self._ending.acquire(blocking=False):
            log.error("a thread of JetStream's driver failed", exc_info=error)
            self._on_failure(self, error)

    def end(self, seconds: float = STOP_S) -> bool:
        """Stop the threads, which may be in a step; whether all ended within `seconds`.

        The owner tells the requests that are still here.
        """
        self._ending.acquire(blocking=False)
        self.live = False
        deadline = time.monotonic() + seconds
        backlogs = (
            self._prefill_backlog,
            *self._transfer_backlogs,
            *self._generate_backlogs.values(),
            *self._detokenize_backlogs,
        )
        while any(thread.is_alive() for thread in self._all_threads):
            if time.monotonic() > deadline:
                return False
            for backlog in backlogs:
                with contextlib.suppress(queue.Empty):
                    while True:
                        backlog.get_nowait()
            time.sleep(0.002)  # in which threads that wait to put do so
            for backlog in backlogs:
                with contextlib.suppress(queue.Full):
                    backlog.put_nowait(None)  # for threads that wait to get
            time.sleep(0.002)
        return True

    def _process_prefill_content(
        self, request: ActiveRequest, tokenizer: Any, is_bos: bool, max_prefill_length: int
    ) -> tuple[np.ndarray, int]:
        if request.start is not None:
            self._prefill_engines[0].announce(request.start)
        tokens = np.asarray(request.prefill_content, np.int32)
        return padded(tokens), len(tokens)

    def _generate_thread(self, idx: int) -> None:
        while self.live:
            try:
                return super()._generate_thread(idx)
            except AssertionError:
                # That a slot is in use. If the last sequences ended just before, all slots are
                # free, so nothing is lost by starting with a new state.
                if self._generate_slots[idx].qsize() < self._generate_slots[idx].maxsize:
                    raise

"""Every variant against transformers, and the same check against decoders with one mistake each."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nrt_jax.checkpoints import load_pretrained
from nrt_jax.checkpoints.hf_config import read_architecture
from nrt_jax.config.architecture import Llama3Scaling
from nrt_jax.models.decoder import abstract_decoder
from nrt_jax.models.rope import inverse_frequencies
from tests.models.parity import assert_parity, kl_divergence
from tests.models.references import VARIANTS, T
from tests.models.tiny import read


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_and_gradients_equal_transformers(reference_of, name):
    reference = reference_of(name)
    definition, state = nnx.split(load_pretrained(reference.directory))
    assert_parity(definition, nnx.to_pure_dict(state), reference)


def test_the_scaling_has_slow_fast_and_blended_frequencies_within_the_sequence(reference_of):
    a = read_architecture(reference_of("llama3.1").directory)
    assert a.rope_scaling is not None
    assert a.rope_scaling.original_max_position_embeddings < T / 4
    plain = inverse_frequencies(a.model_copy(update={"rope_scaling": None}))
    ratio = inverse_frequencies(a) / plain
    assert np.isclose(ratio, 1).any()
    assert np.isclose(ratio, 1 / a.rope_scaling.factor).any()
    assert ((ratio > 0.2) & (ratio < 0.9)).any()


def test_divergence_by_hand():
    """KL((1/2, 1/2) || (1/4, 3/4)) = ln(2) / 2 + ln(2/3) / 2, whatever is added to the logits."""
    logits = np.log([[0.25, 0.75]]) + 3
    expected = (np.log(2) + np.log(2 / 3)) / 2
    np.testing.assert_allclose(kl_divergence(np.zeros((1, 2)), logits), [expected], rtol=1e-12)


# --- mistakes ------------------------------------------------------------------------------------


def swap_gate_and_up(params: dict) -> None:
    mlp = params["layers"]["mlp"]
    mlp["gate"], mlp["up"] = mlp["up"], mlp["gate"]


def interleave_rotary(params: dict) -> None:
    """Heads as Meta stores them: pairs (0, 1), (2, 3) ... instead of (i, i + d/2)."""
    attention = params["layers"]["attention"]
    for name in ("query", "key"):
        halves = attention[name].reshape(*attention[name].shape[:-1], 2, -1)
        attention[name] = jnp.swapaxes(halves, -1, -2).reshape(attention[name].shape)


def turn_backwards(params: dict) -> None:
    """Halves exchanged in queries and keys: each pair turns the other way."""
    attention = params["layers"]["attention"]
    for name in ("query", "key"):
        attention[name] = jnp.roll(attention[name], attention[name].shape[-1] // 2, axis=-1)


def repeat_kv_heads_in_turn(params: dict) -> None:
    """Head h reads kv head h % H instead of h // G: it takes place (h % H) * G + h // H."""
    attention = params["layers"]["attention"]
    N, H = attention["query"].shape[-2], attention["key"].shape[-2]
    heads = np.arange(N)
    order = np.argsort(heads % H * (N // H) + heads // H)
    attention["query"] = attention["query"][:, :, order]
    attention["output"] = attention["output"][:, order]


def transpose_output_heads(params: dict) -> None:
    """o_proj read as [d, N] for [N, d]."""
    output = params["layers"]["attention"]["output"]
    L, N, d, D = output.shape
    params["layers"]["attention"]["output"] = output.reshape(L, d, N, D).swapaxes(1, 2)


def swap_norms(params: dict) -> None:
    layers = params["layers"]
    layers["attention_norm"], layers["mlp_norm"] = layers["mlp_norm"], layers["attention_norm"]


def reverse_layers(params: dict) -> None:
    params["layers"]["mlp"]["down"] = params["layers"]["mlp"]["down"][::-1]


def ones(*path: str) -> Callable[[dict], None]:
    """A norm without its scale."""

    def edit(params: dict) -> None:
        for key in path:
            params = params[key]
        params["scale"] = jnp.ones_like(params["scale"])

    return edit


def drop_head(params: dict) -> None:
    del params["head"]


def copy_embedding_to_head(params: dict) -> None:
    params["head"] = params["embedding"].T


class Mistake(NamedTuple):
    variant: str
    changes: Mapping[str, Any] = MappingProxyType({})
    """To the architecture."""
    edit: Callable[[dict], None] | None = None
    """Of the params."""
    shows_in: str = "logits"


def scaling(**changes: float) -> Llama3Scaling:
    """That of llama3.1 with a change."""
    return Llama3Scaling.model_validate(
        {"factor": 8.0, "original_max_position_embeddings": 64} | changes
    )


UNTIED = {"tie_word_embeddings": False}
MISTAKES = {
    "theta": Mistake("llama3", {"rope_theta": 10000.0}),
    "theta_of_scaled": Mistake("llama3.1", {"rope_theta": 10000.0}),
    "theta_of_mistral": Mistake("mistral_v0.3", {"rope_theta": 10000.0}),
    "no_scaling": Mistake("llama3.1", {"rope_scaling": None}),
    "factor": Mistake("llama3.1", {"rope_scaling": scaling(factor=32.0)}),
    "low_freq_factor": Mistake("llama3.1", {"rope_scaling": scaling(low_freq_factor=2.0)}),
    "high_freq_factor": Mistake("llama3.1", {"rope_scaling": scaling(high_freq_factor=8.0)}),
    "epsilon": Mistake("llama3", {"rms_norm_eps": 1e-6}),
    "window_short": Mistake("mistral_v0.1", {"sliding_window": 99}),
    "window_long": Mistake("mistral_v0.1", {"sliding_window": 101}),
    "no_window": Mistake("mistral_v0.1", {"sliding_window": None}),
    "gate_up": Mistake("llama3", edit=swap_gate_and_up),
    "rotary_interleaved": Mistake("llama3", edit=interleave_rotary),
    "rotary_backwards": Mistake("llama3", edit=turn_backwards),
    "kv_heads_in_turn": Mistake("llama3", edit=repeat_kv_heads_in_turn),
    "output_heads_transposed": Mistake("llama3", edit=transpose_output_heads),
    "norms_swapped": Mistake("llama3", edit=swap_norms),
    "layers_reversed": Mistake("llama3", edit=reverse_layers),
    "final_norm_without_scale": Mistake("llama3", edit=ones("final_norm")),
    "norm_without_scale": Mistake("llama3", edit=ones("layers", "attention_norm")),
    "tied_for_untied": Mistake("llama3", {"tie_word_embeddings": True}, drop_head),
    "other_head_for_tied": Mistake(
        "llama3.2_tied", UNTIED, lambda p: p.update(head=jnp.roll(p["embedding"], 1, axis=0).T)
    ),
    # The values are the same: only the gradient tells.
    "copied_head_for_tied": Mistake(
        "llama3.2_tied", UNTIED, copy_embedding_to_head, r"gradient of \['embedding'\]"
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_parity_would_notice(reference_of, name):
    """The check of `test_logits_and_gradients_equal_transformers` fails for each mistake."""
    mistake = MISTAKES[name]
    reference = reference_of(mistake.variant)
    a = read_architecture(reference.directory)
    params = read(reference.directory, a)
    if mistake.edit is not None:
        mistake.edit(params)
    wrong = nnx.graphdef(abstract_decoder(a.model_copy(update=mistake.changes)))
    with pytest.raises(AssertionError, match=f"^{mistake.shows_in}: off by"):
        assert_parity(wrong, params, reference)

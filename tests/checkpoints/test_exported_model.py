"""What `export` writes, as transformers reads it."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nrt_jax.checkpoints.open import open_model
from nrt_jax.cli import main
from nrt_jax.models.decoder import Decoder

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


def test_transformers_computes_the_same(reference, tmp_path):
    """From the text of a prompt to the logits, against the weights of the checkpoint itself."""
    run = reference("method=nrt")
    assert main(["export", str(run.directory), str(tmp_path / "model")]) == 0
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    trained = open_model(run.directory)
    tokens = tokenizer.encode("1+2+3", add_special_tokens=False)
    assert tokens == trained.tokenizer.encode("1+2+3")
    tokens_BT = np.array([tokens, tokens[::-1]])
    with torch.no_grad():
        theirs_BTV = model(torch.tensor(tokens_BT)).logits.numpy()
    definition = nnx.graphdef(
        nnx.eval_shape(lambda: Decoder(trained.model.architecture, nnx.Rngs(0)))
    )
    ours_BTV = nnx.merge(definition, nnx.State(trained.params))(jnp.asarray(tokens_BT))
    assert np.abs(theirs_BTV).max() > 0.1
    np.testing.assert_allclose(ours_BTV, theirs_BTV, rtol=0, atol=1e-4)

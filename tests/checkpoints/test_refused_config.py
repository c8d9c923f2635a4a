"""config.json: what the decoder does not compute, and what is no config, is refused by name."""

import pytest

from nrt_jax.checkpoints.hf_config import read_architecture
from nrt_jax.errors import InputError
from tests.models.references import edit_config, llama3_rope, plain_rope

LLAMA3, PLAIN = llama3_rope(8.0), plain_rope(1e6)

UNKNOWN = "not implemented; if it changes nothing in the model, take it out of the file"
REFUSED = [
    ({"unknown_and_zero": 0}, f"unknown_and_zero=0: {UNKNOWN}"),
    ({"_unknown": 7}, f"_unknown=7: {UNKNOWN}"),
    ({"vocab_size": 10**30}, "must be less than 2147483648"),
    ({"model_type": "qwen2"}, 'model_type="qwen2": must be llama or mistral'),
    ({"model_type": None}, "model_type=null: must be llama or mistral"),
    ({"model_type": ["llama"]}, 'model_type=["llama"]: must be llama or mistral'),
    ({"architectures": ["LlamaModel"]}, 'architectures=["LlamaModel"]: must be'),
    ({"architectures": ["MistralForCausalLM"]}, 'must be ["LlamaForCausalLM"]'),
    ({"attention_bias": True}, "attention_bias=true: not implemented; only false is"),
    ({"mlp_bias": True}, "mlp_bias=true: not implemented; only false is"),
    ({"hidden_act": "gelu"}, 'hidden_act="gelu": not implemented; only "silu"'),
    ({"attention_dropout": 0.1}, "attention_dropout=0.1: not implemented"),
    ({"quantization_config": {"bits": 4}}, 'quantization_config={"bits": 4}: quantised'),
    ({"quantization_config": {}}, "quantization_config={}: quantised"),
    ({"compression_config": {"format": "x"}}, "compressed weights are not read"),
    ({"auto_map": {"AutoModel": "x.Y"}}, "trust_remote_code"),
    ({"is_encoder_decoder": True}, "is_encoder_decoder=true: not implemented"),
    ({"add_cross_attention": True}, "add_cross_attention=true: not implemented"),
    ({"pruned_heads": {"0": [1]}}, 'pruned_heads={"0": [1]}: not implemented'),
    # transformers takes the causal mask away.
    ({"is_causal": False}, "is_causal=false: not implemented; only true is"),
    ({"sliding_window": 8}, "sliding_window 8 must be null, or family must be mistral"),
    ({"layer_types": ["sliding_attention"]}, "layer_types="),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "layers of different kinds"),
    ({"layer_types": "full_attention"}, "layer_types="),
    ({"logit_softcapping": 30}, f"logit_softcapping=30: {UNKNOWN}"),
    ({"final_logit_softcapping": 30.0}, f"final_logit_softcapping=30.0: {UNKNOWN}"),
    ({"attn_logit_softcapping": 50.0}, f"attn_logit_softcapping=50.0: {UNKNOWN}"),
    ({"attention_multiplier": 0.01}, f"attention_multiplier=0.01: {UNKNOWN}"),
    ({"embedding_multiplier": 12.0}, f"embedding_multiplier=12.0: {UNKNOWN}"),
    ({"residual_multiplier": 0.2}, f"residual_multiplier=0.2: {UNKNOWN}"),
    ({"logits_scaling": 8.0}, f"logits_scaling=8.0: {UNKNOWN}"),
    ({"query_pre_attn_scalar": 256}, f"query_pre_attn_scalar=256: {UNKNOWN}"),
    ({"qk_norm": True}, f"qk_norm=true: {UNKNOWN}"),
    ({"use_qk_norm": True}, f"use_qk_norm=true: {UNKNOWN}"),
    ({"num_local_experts": 8}, f"num_local_experts=8: {UNKNOWN}"),
    ({"num_experts_per_tok": 2}, f"num_experts_per_tok=2: {UNKNOWN}"),
    ({"attention_chunk_size": 8192}, f"attention_chunk_size=8192: {UNKNOWN}"),
    ({"no_rope_layers": [1, 0]}, f"no_rope_layers=[1, 0]: {UNKNOWN}"),
    ({"alibi": True}, f"alibi=true: {UNKNOWN}"),
    *(
        (
            {"rope_parameters": {"rope_type": kind, "factor": 2.0}},
            f'rope_parameters.rope_type="{kind}": not implemented; only default and llama3 are',
        )
        for kind in ("linear", "dynamic", "yarn", "longrope", "su", "mrope")
    ),
    (
        {"rope_parameters": ..., "rope_scaling": {"type": "linear", "factor": 2.0}},
        'rope_scaling.type="linear": not implemented; only default and llama3 are',
    ),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, 'must agree with rope_scaling.type="li'),
    ({"rope_scaling": {"rope_type": "yarn", "type": "llama3"}}, "must agree with"),
    ({"rope_parameters": {"full_attention": PLAIN}}, "rope_parameters.full_attention="),
    ({"rope_parameters": {"factor": 2.0}}, "rope_parameters.factor=2.0: not implemented with"),
    ({"rope_parameters": PLAIN | {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5: not implemented; only 1.0 is"),
    ({"rope_parameters": LLAMA3 | {"attention_factor": 2.0}}, "attention_factor=2.0"),
    ({"rope_parameters": LLAMA3 | {"factor": None}}, "factor: required by rope_type llama3"),
    ({"rope_parameters": LLAMA3 | {"factor": -1}}, "rope_scaling.factor=-1: must be greater"),
    (
        {"rope_parameters": LLAMA3 | {"low_freq_factor": 4.0}},
        "high_freq_factor 4.0 must be above low_freq_factor 4.0",
    ),
    ({"rope_parameters": PLAIN, "rope_theta": 5.0}, "must agree with rope_theta=5.0"),
    (
        {"rope_parameters": LLAMA3, "original_max_position_embeddings": 128},
        "must agree with original_max_position_embeddings=128",
    ),
    ({"rope_parameters": [1]}, "rope_parameters=[1]: must be an object or null"),
    ({"rope_parameters": PLAIN | {"rope_theta": 0}}, "rope_theta=0: must be greater than 0"),
    ({"rope_parameters": PLAIN | {"rope_theta": 1e999}}, "rope_theta=Infinity: must be"),
    ({"num_key_value_heads": 3}, "num_key_value_heads 3 must divide num_attention_heads 4"),
    ({"num_attention_heads": 5, "head_dim": None}, "num_attention_heads=5: must divide"),
    ({"num_attention_heads": 0, "head_dim": None}, "num_attention_heads=0: must divide"),
    ({"head_dim": 7}, "head_dim 7 must be even"),
    ({"vocab_size": ...}, "vocab_size: required"),
    ({"num_hidden_layers": None}, "num_hidden_layers: required"),
    ({"num_hidden_layers": 0}, "num_hidden_layers=0: must be greater"),
    ({"hidden_size": "wide"}, 'hidden_size="wide": must be a valid integer'),
    ({"rms_norm_eps": None}, "rms_norm_eps=null: must be"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_config_is_refused_by_name(copy, changes, message):
    edit_config(copy, **changes)
    with pytest.raises(InputError) as error:
        read_architecture(copy)
    text = str(error.value)
    assert text.startswith(f"{copy / 'config.json'}: ")
    assert message in text
    assert "\n" not in text


def test_layers_of_mistral_must_all_have_the_window(copy):
    mistral = {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    sliding = ["sliding_attention"] * 2
    read_architecture(edit_config(copy, **mistral, sliding_window=8, layer_types=sliding))
    edit_config(copy, layer_types=["full_attention", "sliding_attention"])
    with pytest.raises(InputError, match=r"layer_types=.*each must be sliding_attention"):
        read_architecture(copy)


def test_config_that_is_no_json_object(tmp_path):
    with pytest.raises(InputError, match=r"config.json: no such file; give a Hugging Face"):
        read_architecture(tmp_path)
    for text, message in (
        ("{", "must be JSON"),
        ("[]", "must be a JSON object"),
        ('{"a": 1, "a": 2}', "the key 'a' occurs twice"),
        ('{"rope_parameters": {"a": 1, "a": 2}}', "the key 'a' occurs twice"),
    ):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(InputError, match=message):
            read_architecture(tmp_path)
    (tmp_path / "config.json").write_bytes(b"\xff\xfe{")
    with pytest.raises(InputError, match=r"config.json: cannot be read"):
        read_architecture(tmp_path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").mkdir()
    with pytest.raises(InputError, match=r"config.json: cannot be read: Is a directory"):
        read_architecture(tmp_path)

"""Tokenizers that must not be trained with are refused, and good ones are not."""

import json
import shutil

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models

from nrt_jax.data.tokenizer import Tokenizer
from nrt_jax.errors import InputError
from tests.data.made_tokenizers import KINDS, save

AGAIN = "download tokenizer.json again from the model's page"


def refusal(directory) -> str:
    with pytest.raises(InputError) as caught:
        Tokenizer.load(directory, "<a>", "<b>")
    text = str(caught.value)
    assert "\n" not in text
    return text


def edited(source, target, edit):
    """A copy of a tokenizer with an edited tokenizer.json."""
    shutil.copytree(source, target)
    path = target / "tokenizer.json"
    data = json.loads(path.read_text())
    edit(data)
    path.write_text(json.dumps(data))
    return target


@pytest.mark.parametrize("kind", KINDS)
def test_good_tokenizers_load(kind, made):
    assert made(kind).vocab_size > 500


def test_no_vocabulary_to_speak_of(tmp_path):
    names = ("<unk>", "<s>", "</s>")
    backend = tokenizers.Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
    backend.add_special_tokens([AddedToken(name, normalized=False) for name in names])
    save(backend, tmp_path, eos_token="</s>", unk_token="<unk>")
    assert refusal(tmp_path) == (
        f"{tmp_path / 'tokenizer.json'}: has 0 ordinary vocabulary entries, as saved by a "
        f"tokenizer that did not find its vocabulary; {AGAIN}"
    )


def test_characters_that_vanish(tmp_path):
    vocabulary = {chr(code): i for i, code in enumerate(range(32, 127))}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([AddedToken("</s>", normalized=False)])
    save(backend, tmp_path, eos_token="</s>")
    assert refusal(tmp_path) == (
        f"{tmp_path / 'tokenizer.json'}: encodes 'one\\n\\ntwo\\n' to ids that decode to "
        f"'onetwo'; {AGAIN}"
    )


def test_spaces_that_vanish(made_directory, tmp_path):
    def collapse(data):
        data["normalizer"]["normalizers"].insert(
            0, {"type": "Replace", "pattern": {"Regex": " +"}, "content": " "}
        )

    broken = edited(made_directory("prepend"), tmp_path / "t", collapse)
    assert "encodes 'a  b   c    d' to ids that decode to 'a b c d'" in refusal(broken)


def test_a_large_vocabulary_without_bytes(made_directory, tmp_path):
    def grow(data):
        model = data["model"]
        model["byte_fallback"] = False
        assert "!" not in model["vocab"]
        ids = range(len(model["vocab"]), len(model["vocab"]) + 800)
        model["vocab"] |= {f"word{i}": i for i in ids}

    broken = edited(made_directory("prepend"), tmp_path / "t", grow)
    assert "none to spell all of 'The sum of 1,234 and 5.6 is 1239.6!'" in refusal(broken)


def test_only_a_sentencepiece_model(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>")
    text = refusal(tmp_path)
    assert text.startswith(f"{tmp_path}: has tokenizer.model and no tokenizer.json, and a conver")
    assert "download tokenizer.json from the model's page" in text


def by_id(data) -> None:
    """The merges as a conversion orders them that knows no scores."""
    vocabulary = data["model"]["vocab"]
    data["model"]["merges"].sort(key=lambda merge: vocabulary["".join(merge)])


def test_merges_ordered_without_scores(mistral_directory, tmp_path):
    """What transformers 5 makes of Mistral's tokenizer.model is ordered so, merge by merge."""
    broken = edited(mistral_directory, tmp_path / "t", by_id)
    assert refusal(broken) == (
        f"{broken / 'tokenizer.json'}: was converted from a sentencepiece model without its "
        "scores: 'a  b' becomes ▁a ▁▁ b, and the model was trained on ▁a ▁ ▁b; " + AGAIN
    )


def test_a_vocabulary_that_does_merge_spaces_first_is_no_mistake(made_directory, tmp_path):
    def first(data):
        data["model"]["merges"].sort(key=lambda merge: "".join(merge) != "▁▁")

    good = edited(made_directory("prepend"), tmp_path / "t", first)
    loaded = Tokenizer.load(good)
    assert loaded.find("▁▁") in loaded.encode("a  b")

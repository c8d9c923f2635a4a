"""Answers and log-likelihoods of SmolLM2 against `lm_eval --model hf` on torch."""

import pytest

pytestmark = pytest.mark.slow


def test_answers_and_log_likelihoods_are_those_of_torch(smollm2, shared_data):
    pytest.importorskip("accelerate", reason="lm-eval's model for transformers needs accelerate")
    from benchmarks.evaluate_parity import compare

    results = compare(
        smollm2, shared_data, ("gsm8k", "popqa", "truthfulqa"), documents=2, max_tokens=32
    )
    *generative, scored = results
    for result in generative:
        assert result["equal_prompts"] == result["equal_scores"] == result["documents"] == 2
        assert result["equal_answers"] + result["ties"] == 2
        assert result["tokens"] > 4
    assert scored["given_answers"] > 8
    assert scored["largest_difference"] < 1e-3

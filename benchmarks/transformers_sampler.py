"""The same random model in `transformers`, for a comparison in one run. Needs torch."""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from nrt_jax.checkpoints.hf_weights import write_directory
from nrt_jax.config.architecture import Architecture


class TransformersSampler:
    """`generate` at temperature 1, on the GPU where torch has one."""

    def __init__(self, architecture: Architecture, params: Any, dtype: str):
        with tempfile.TemporaryDirectory() as folder:
            directory = Path(folder) / "model"
            write_directory(directory, architecture, params)
            model = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype))
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model: Any = model.to(self._device).eval()

    def __call__(self, tokens_BS: np.ndarray, new_tokens: int) -> np.ndarray:
        """`new_tokens` tokens after each of B prompts of one length."""
        prompt = torch.as_tensor(tokens_BS, dtype=torch.long, device=self._device)
        with torch.inference_mode():
            out = self._model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                min_new_tokens=new_tokens,
                max_new_tokens=new_tokens,
                do_sample=True,
                top_k=0,
                pad_token_id=0,
            )
        return out[:, prompt.shape[1] :].cpu().numpy()

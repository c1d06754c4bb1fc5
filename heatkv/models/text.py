"""Prompts to text features, by the T5 encoder that Infinity was trained with. Needs the extra `heatkv[infinity]`.

Shapes: M positions of a prompt, its end of sequence included; E channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from heatkv.errors import ModelError

PUBLIC_ENCODER = "google/flan-t5-xl"
MAX_POSITIONS = 512


class T5TextEncoder:
    """Tokenizer and encoder from a local folder or a name on the Hugging Face hub.

    Raises ModelError when transformers is not installed, or `source` holds no T5 encoder.
    """

    def __init__(
        self,
        source: str | Path = PUBLIC_ENCODER,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        try:
            from transformers import AutoTokenizer, T5EncoderModel
        except ImportError as error:
            raise ModelError(
                f"turning prompts into features needs transformers ({error}); install heatkv[infinity], or give text "
                "features"
            ) from error
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(str(source))
            self._encoder = T5EncoderModel.from_pretrained(str(source), dtype=dtype).eval().to(device)
        except (OSError, ValueError) as error:
            raise ModelError(f"no T5 encoder can be loaded from {source}: {str(error).splitlines()[0]}") from error

    def encode(self, texts: Sequence[str]) -> list[Tensor]:
        """Features (M, E) of every text in fp32, cut at 512 positions."""
        tokens = self._tokenizer(
            list(texts), padding=True, truncation=True, max_length=MAX_POSITIONS, return_tensors="pt"
        ).to(self._encoder.device)
        with torch.inference_mode():
            out = self._encoder(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
            return [row[mask.bool()].float() for row, mask in zip(out[0], tokens.attention_mask, strict=True)]

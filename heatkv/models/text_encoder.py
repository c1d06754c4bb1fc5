"""Prompts to text features, by the T5 encoder that Infinity was trained with. Needs the extra `heatkv[infinity]`.

Shapes: M positions of a prompt, its end of sequence included; E channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from heatkv.core.schema import shown
from heatkv.engine.watch import finite, way_out
from heatkv.errors import ModelError, NumericsError

PUBLIC_ENCODER = "google/flan-t5-xl"
MAX_POSITIONS = 512
_AT_ONCE = 32
"""Texts that are encoded together."""
_TOKENIZERS = ("tokenizer.json", "spiece.model")


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep progress bars and reports of transformers off the error stream: what matters of them is raised here."""
    from transformers.utils import logging

    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


class T5TextEncoder:
    """Tokenizer and encoder from a local folder or a name on the Hugging Face hub.

    The encoder's weights are read when texts are encoded, and given back after that unless `keep`: they are as large as
    a transformer, and drawing does not need them. Raises ModelError when transformers is not installed, or `source`
    holds no tokenizer; `encode` where it holds no whole T5 encoder.
    """

    def __init__(
        self,
        source: str | Path = PUBLIC_ENCODER,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        keep: bool = False,
    ) -> None:
        try:
            from transformers import AutoTokenizer
        except ImportError as error:
            raise ModelError(
                f"turning prompts into features needs transformers ({error}); install heatkv[infinity], or give text "
                "features"
            ) from error
        folder = Path(source)
        local = folder.is_dir()
        # without any of these, transformers makes a tokenizer that knows no word
        if local and not any((folder / name).exists() for name in _TOKENIZERS):
            raise _not_loaded(source, f"it holds none of {', '.join(_TOKENIZERS)}")
        try:
            with _quietly():
                self._tokenizer = AutoTokenizer.from_pretrained(
                    str(source), trust_remote_code=False, local_files_only=local
                )
        except Exception as error:  # transformers and tokenizers raise nearly everything for damaged files
            raise _not_loaded(source, (str(error).strip() or type(error).__name__).splitlines()[0]) from error
        self._source, self._local, self._dtype, self._device, self._keep = source, local, dtype, device, keep
        self._kept: Any = None

    def _opened(self) -> Any:
        """The encoder, read anew unless it was kept. Raises ModelError."""
        if self._kept is not None:
            return self._kept
        from transformers import T5EncoderModel

        source = self._source
        try:
            with _quietly():
                encoder, report = T5EncoderModel.from_pretrained(
                    str(source), dtype=self._dtype, output_loading_info=True, ignore_mismatched_sizes=True,
                    trust_remote_code=False, weights_only=True, local_files_only=self._local,
                )  # fmt: skip
        except Exception as error:  # transformers and tokenizers raise nearly everything for damaged files
            raise _not_loaded(source, (str(error).strip() or type(error).__name__).splitlines()[0]) from error
        # transformers would go on with random numbers in their place
        unfit = {f"{name} is missing" for name in report["missing_keys"]}
        unfit |= {f"{name} is of another shape" for name, *_ in report["mismatched_keys"]}
        if unfit:
            raise _not_loaded(source, min(unfit))
        known, embedded = len(self._tokenizer), encoder.config.vocab_size
        if known > embedded:
            raise ModelError(f"the tokenizer in {source} knows {known} tokens, the encoder {embedded}")
        encoder = encoder.eval().to(self._device)
        self._kept = encoder if self._keep else None
        return encoder

    def encode(self, texts: Sequence[str]) -> list[Tensor]:
        """Features (M, E) of every text in fp32, cut at 512 positions, the same tensor for the same text.

        Raises NumericsError, and ModelError for weights that cannot be read.
        """
        encoder, found, distinct = self._opened(), dict[str, Tensor](), list(dict.fromkeys(texts))
        for first in range(0, len(distinct), _AT_ONCE):
            part = distinct[first : first + _AT_ONCE]
            tokens = self._tokenizer(
                part, padding=True, truncation=True, max_length=MAX_POSITIONS, return_tensors="pt"
            ).to(encoder.device)
            with torch.inference_mode():
                out = encoder(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
                for text, row, mask in zip(part, out[0], tokens.attention_mask, strict=True):
                    found[text] = row[mask.bool()].float()
        for text, features_ME in found.items():
            if not finite(features_ME):
                raise NumericsError(
                    f"the text encoder gave features that are not finite for {shown(text)}; {way_out(encoder.dtype)}"
                )
        return [found[text] for text in texts]


def _not_loaded(source: str | Path, reason: str) -> ModelError:
    return ModelError(f"no T5 encoder can be loaded from {source}: {reason}")

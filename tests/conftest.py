"""Shared fixtures and the `--golden` option."""

from __future__ import annotations

import json
import os
from pathlib import Path

import hypothesis
import pytest
import torch

from heatkv.models.catalogue import load_model
from heatkv.models.class_conditional import ClassConditionalModel

HERE = Path(__file__).parent

hypothesis.settings.register_profile("default", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("default")
torch.set_num_threads(1)
# Without a GPU, Triton's kernels run in its interpreter, which must be asked for before anything imports Triton.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden", action="append", default=[], metavar="DIR", help="also check every golden set below DIR"
    )


def golden_files(config: pytest.Config) -> list[Path]:
    """The json of every golden set, of this folder and of those named by --golden."""
    folders = [HERE / "golden", *(Path(given).resolve() for given in config.getoption("--golden"))]
    files = []
    for folder in folders:
        found = sorted(path for path in folder.rglob("*.json") if "orders" not in path.parts)
        if not found:
            raise pytest.UsageError(f"--golden {folder}: no golden set there")
        files += found
    return files


def _draws(path: Path) -> bool:
    """Whether a golden set holds what a model computes for recorded codes, scale by scale."""
    told = json.loads(path.read_text())
    files = told.get("files")
    whole = isinstance(files, dict) and bool(files.get("expected"))
    return whole or "runs" in told or {"model_set", "last_read"} <= told.keys()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for name in {"golden_file", "golden_model"} & set(metafunc.fixturenames):
        files = golden_files(metafunc.config)
        if name == "golden_model":
            files = [path for path in files if _draws(path)]
        metafunc.parametrize(name, files, ids=[f"{path.parent.name}/{path.stem}" for path in files])


@pytest.fixture(scope="session")
def t5_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A T5 encoder of two layers, 24 channels, with a tokenizer of a few words, as `from_pretrained` reads it."""
    import tokenizers
    import transformers

    folder = tmp_path_factory.mktemp("t5")
    words = {"<pad>": 0, "</s>": 1, "<unk>": 2, "a": 3, "cat": 4, "red": 5, "dog": 6}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.T5Config(vocab_size=7, d_model=24, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    transformers.T5EncoderModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def emoji() -> ClassConditionalModel:
    """The embedded model, in fp32."""
    return load_model("emoji")

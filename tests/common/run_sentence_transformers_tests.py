"""Runs sentence-transformers' own tests of loading, prompts, encoding, saving and pools on a tiny viPolyQwen.

    python tests/common/run_sentence_transformers_tests.py SOURCE [PATTERN]

SOURCE is a checkout of sentence-transformers, or the last source distribution that has tests (`pip download --no-deps
--no-binary :all: sentence-transformers==5.3.0`, unpacked); they run against the installed version. Every checkpoint
that they name becomes a tiny viPolyQwen of 128 dimensions, the width that they expect, without prompts of its own and
loaded as remote code. PATTERN runs only tests whose name contains it. Pytest does not collect this file. The exit code
is 1 if a test fails for which `REASONS` gives no reason, or passes in spite of one.
"""

import argparse
import json
import os
import sys
import tempfile
import types
from copy import deepcopy
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from outcomes import report
from sentence_transformers import SentenceTransformer

from vipolyqwen.demo.tiny_base import build_tiny_base
from vipolyqwen.publishing.repository import save_repository

FILES = (
    "test_sentence_transformer.py",  # these three as the source distribution has them, the others as the checkout
    "test_multi_process.py",
    "test_compute_embeddings.py",
    "sentence_transformer/test_model.py",
    "sentence_transformer/test_multi_process.py",
    "base/test_model.py",
    "base/test_modality.py",
)
RENAMED = {'kwargs["sentences"]': 'kwargs["inputs"]'}  # in the tests of 5.3.0 -> since
TEXTS = ["lower newer upper older longer string", "Hai ngôi sao đỏ lớn trên bãi cỏ.", "沙滩上有四个绿色的小方块。"]
FIXTURES = ("stsb_bert_tiny_model", "paraphrase_distilroberta_base_v1_model", "distilbert_base_uncased_model")

# Beginning of a test's name -> why it fails here and what that means.
NEEDS_HUB = "not applicable: it wants a certain checkpoint, or two revisions of one, from the Hub"
NEEDS_POOLING = "not applicable: it looks for token embeddings or a pooling module; this model gives one vector"
OLDER = "sentence-transformers: the test is older than the installed version, which renamed what it looks at"
OTHER_MODULES = "not applicable: it builds other modules of sentence-transformers than a checkpoint's"
ROUNDING = (
    "by rounding: a copied model is 1e-8 from the loaded one, and the test allows 1e-5 of a value that is near 0"
)
NOT_TRAINED = "not applicable: the tiny model has random weights and the test expects trained similarities"
ZERO_MEAN = "not applicable: it expects only normalised vectors to have a mean near 0; the LayerNorm gives that to all"
MORE_MODALITIES = "not applicable: the test's checkpoint takes text only, this one images, sounds and messages too"
REASONS = {
    "test_preprocess_rejects_unsupported_modality": MORE_MODALITIES,
    "test_sentence_transformer": MORE_MODALITIES,
    "test_load_with_safetensors": NEEDS_HUB,
    "test_load_with_revision": NEEDS_HUB,
    "test_clip": NEEDS_HUB,
    "test_multiple_adapters": NEEDS_HUB,
    "test_encode_single_sentences": "not applicable: it expects 768 dimensions and the sums of a certain checkpoint",
    "test_encode_normalize": "not applicable: it expects 768 dimensions",
    "test_encode_tuple_sentences": "by design: a pair in place of an input is an error, it would become one vector",
    "test_prompt_output_value_None": NEEDS_POOLING,
    "test_encode_token_embeddings": NEEDS_POOLING,
    "test_multi_process_with_one_single_string[token_embeddings": NEEDS_POOLING,
    "test_get_model_kwargs": NEEDS_POOLING,
    "test_load_local_without_normalize_directory": OLDER,
    "test_push_to_hub": OLDER,
    "test_prompts": OLDER,
    "test_load_with_model_kwargs": OLDER,
    "test_override_config_versions": OLDER,
    "test_similarity_score[maxsim]": OLDER,
    "test_similarity_score[meanmaxsim]": OLDER,
    "test_prompt_length_calculation": (
        "not applicable: prompts are task prefixes in the message, so no pooling needs to know their length"
    ),
    "test_load_checkpoint_with_peft_and_lora": "not applicable: it names BERT's query, key and value as LoRA targets",
    "test_safetensors": OTHER_MODULES,
    "test_similarity_score[cosine]": NOT_TRAINED,
    "test_similarity_score[dot]": NOT_TRAINED,
    "test_encode_truncate[sentence_embedding-True-True-True-Single sentence]": ROUNDING,
    "test_encode_truncate[sentence_embedding-True-True-False-Single sentence]": ROUNDING,
    "test_encode_truncate[sentence_embedding-True-False-True-Single sentence]": ROUNDING,
    "test_encode_truncate[sentence_embedding-True-False-False-Single sentence]": ROUNDING,
    "test_encode_multi_process[None-False]": ZERO_MEAN,
    "test_encode_multi_process[retrieval-False]": ZERO_MEAN,
}


class Plugin:
    """Puts the tiny model in the place of every checkpoint, and notes what became of each test."""

    def __init__(self, repository: Path, pattern: str) -> None:
        self.repository = repository
        self.pattern = pattern
        self.rows: dict[str, tuple[str, str]] = {}  # name -> (outcome, note)

    def replace_checkpoints(self) -> None:
        """Makes `SentenceTransformer(NAME)` load the tiny model, unless NAME is a folder that a test wrote."""
        load, repository = SentenceTransformer.__init__, str(self.repository)

        def load_tiny(model: SentenceTransformer, name: str | None = None, *args: Any, **kwargs: Any) -> None:
            if name is not None:
                name = name if Path(name).is_dir() else repository
                kwargs = {"trust_remote_code": True, "device": "cpu", **kwargs, "revision": None}
            load(model, name, *args, **kwargs)

        SentenceTransformer.__init__ = load_tiny

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Keeps the tests that were asked for."""
        items[:] = [item for item in items if self.pattern in item.name]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Notes the outcome; of a test that fails, the last line of the error."""
        file, test = report.nodeid.split("::", 1)
        name = f"{Path(file).stem}.{test}"
        if report.failed:
            self.rows[name] = ("fail", " ".join(report.longreprtext.strip().splitlines()[-3:])[-300:])
        elif report.skipped:
            self.rows[name] = ("skip", str(report.longrepr[2]))
        elif report.when == "call":
            self.rows[name] = ("pass", "")


def make_fixtures() -> type:
    """The fixtures of sentence-transformers' conftest, which the source distribution leaves out."""

    def new(name: str) -> Any:
        @pytest.fixture(name=name)
        def fixture(_: Any, tiny_vipolyqwen: SentenceTransformer) -> SentenceTransformer:
            return deepcopy(tiny_vipolyqwen)

        return fixture

    @pytest.fixture(scope="session")
    def tiny_vipolyqwen(_: Any) -> SentenceTransformer:
        model = SentenceTransformer("tiny")
        model.model_card_data.generate_widget_examples = False
        return model

    return type("Fixtures", (), {"tiny_vipolyqwen": tiny_vipolyqwen, **{name: new(name) for name in FIXTURES}})


def save_tiny(folder: Path) -> None:
    """Writes a tiny repository without prompts of its own, as the checkpoints in the tests have none."""
    torch.manual_seed(0)
    model, processor = build_tiny_base(
        TEXTS * 4,
        hidden_size=64,
        layers=2,
        vision_size=32,
        audio_size=32,
        image_side=56,
        vocab_size=400,
        projection_dim=128,
    )
    save_repository(model.eval(), processor, folder)
    path = folder / "config_sentence_transformers.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), "prompts": {}}), encoding="utf-8")


def copy_tests(source: Path, folder: Path) -> list[str]:
    """Copies the tests that are there, with what was renamed since they were written."""
    copies = []
    for name in FILES:
        if (source / name).is_file():
            text = (source / name).read_text(encoding="utf-8")
            for old, new in RENAMED.items():
                text = text.replace(old, new)
            copies.append(folder / name.replace("/", "_"))
            copies[-1].write_text(text, encoding="utf-8")
    return [str(path) for path in copies]


def reason_of(test: str) -> str | None:
    """Why a test fails here, by the beginning of its name."""
    return next((REASONS[start] for start in REASONS if test.startswith(start)), None)


def main() -> int:
    """Runs the tests and prints what became of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="folder of the unpacked source distribution")
    parser.add_argument("pattern", nargs="?", default="", help="run only tests whose name contains this")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    sys.modules["tests"] = types.ModuleType("tests")
    sys.modules["tests.utils"] = types.ModuleType("tests.utils")  # what the source distribution leaves out
    vars(sys.modules["tests.utils"]).update(is_ci=lambda: False, CrashingModel=None)
    with tempfile.TemporaryDirectory() as folder:
        files = copy_tests(arguments.source / "tests", Path(folder))
        if not files:
            parser.error(f"{arguments.source}/tests has none of {', '.join(FILES)}; see --help for what to unpack.")
        save_tiny(Path(folder) / "tiny")
        plugin = Plugin(Path(folder) / "tiny", arguments.pattern)
        plugin.replace_checkpoints()
        options = ["-q", "--no-header", "--tb=short", "--rootdir", folder, "-p", "no:cacheprovider", "-W", "ignore"]
        pytest.main([*options, "--import-mode=importlib", *files], plugins=[plugin, make_fixtures()()])
    return 0 if report(plugin.rows, reason_of) else 1


if __name__ == "__main__":
    sys.exit(main())

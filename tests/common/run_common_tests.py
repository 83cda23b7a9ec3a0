"""Runs transformers' own common model, configuration and processor tests against viPolyQwen.

    python tests/common/run_common_tests.py TRANSFORMERS_SDIST [PATTERN]

TRANSFORMERS_SDIST is the unpacked source distribution of the installed version (`pip download --no-deps --no-binary
transformers transformers==…`): the wheel has no tests. PATTERN runs only tests whose name contains it. Pytest does not
collect this file. The exit code is 1 if a test fails for which `REASONS` gives no reason, or passes in spite of one.
"""

import argparse
import os
import sys
import tempfile
import types
import unittest
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import soundfile
import torch
import transformers
import transformers.testing_utils
import transformers.utils
from outcomes import report
from PIL import Image
from transformers import AutoConfig, AutoModel, Qwen2VLImageProcessorPil, Wav2Vec2FeatureExtractor
from transformers.models.auto import modeling_auto

from vipolyqwen.configuration_vipolyqwen import ViPolyQwenConfig
from vipolyqwen.demo.tiny_base import tiny_audio_config, tiny_vlm_config, train_tokenizer
from vipolyqwen.modeling_vipolyqwen import ViPolyQwenModel
from vipolyqwen.processing_vipolyqwen import ViPolyQwenProcessor

TEXTS = ["lower newer upper older longer string", "Hai ngôi sao đỏ lớn trên bãi cỏ.", "沙滩上有四个绿色的小方块。"]

# Test -> why it fails here and what that means.
NO_HIDDEN_STATE = "not applicable: it compares `last_hidden_state`, and our output is `embeddings`"
SAVED_IS_NOT_LOADED = (
    "transformers: saving any class that is registered for the Hub notes `auto_map` in the saved object, loading does "
    "not; passes with ViPolyQwenProcessor._auto_class = None"
)
REASONS = {
    "test_model_rope_scaling_from_config_0_linear": NO_HIDDEN_STATE,
    "test_model_rope_scaling_from_config_1_dynamic": NO_HIDDEN_STATE,
    "test_model_rope_scaling_from_config_2_yarn": NO_HIDDEN_STATE,
    "test_processor_from_and_save_pretrained": SAVED_IS_NOT_LOADED,
    "test_processor_from_and_save_pretrained_as_nested_dict": SAVED_IS_NOT_LOADED,
    "test_apply_chat_template_assistant_mask": "not applicable: nothing is generated, so no token is the assistant's",
    "test_chat_template_audio_sampling_rate": (
        "by design: `apply_chat_template` goes from the parts to the tensors, so that no content can forge a token; "
        "it does not call the `__call__` that the test watches"
    ),
    "test_subprocessor_defaults_0_text": "by design: the processor ends every input with the end token",
    "test_subprocessor_defaults_3_audio": (
        "not applicable: it hands the same sound to the stock feature extractor, which takes no sampling rate with "
        "it; without one our processor refuses a bare array"
    ),
}


def make_stubs(folder: Path) -> None:
    """Stands in for the parts of transformers' test suite that its source distribution leaves out."""

    def module(name: str, **members: Any) -> None:
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(members)

    def local_file(url: str) -> str:
        """A file of the kind that `url` names, for there is no network."""
        path = folder / url.rsplit("/", 1)[-1]
        generator = np.random.default_rng(len(url))
        if path.suffix in (".png", ".jpg"):
            Image.fromarray(generator.integers(0, 256, (48, 60, 3), dtype=np.uint8)).save(path)
        elif path.suffix in (".wav", ".mp3"):
            path = path.with_suffix(".wav")
            soundfile.write(path, generator.uniform(-0.5, 0.5, 8000), 16_000)
        return str(path)

    module("fetch_hub_objects_for_ci", url_to_local_path=local_file)
    for package in ("exporters", "generation", "utils"):
        module(f"tests.{package}", __path__=[])
    module("tests.exporters.test_export", ExportTesterMixin=type("ExportTesterMixin", (), {}))
    module("tests.generation.test_utils", GenerationTesterMixin=type("GenerationTesterMixin", (), {}))
    module("tests.utils.test_configuration_utils", config_common_kwargs={})
    transformers.utils.direct_transformers_import = lambda path, file="__init__.py": transformers
    transformers.testing_utils.is_librosa_available = lambda: True  # our processor reads sounds without it


def register_classes() -> None:
    """Tells transformers that ours is a base model, for some tests are only for those."""
    modeling_auto.MODEL_MAPPING_NAMES["vipolyqwen"] = "ViPolyQwenModel"
    AutoConfig.register("vipolyqwen", ViPolyQwenConfig)
    AutoModel.register(ViPolyQwenConfig, ViPolyQwenModel)


class ModelTester:
    """Sizes and inputs of the common model tests: every row has a text, an image and a sound."""

    def __init__(self, parent: unittest.TestCase, with_images: bool = True) -> None:
        self.parent = parent
        self.with_images = with_images
        self.batch_size = 3
        self.patches = 4  # of each image, on a 4 × 4 grid, merged 2 × 2
        self.seq_length = 7 + self.patches
        self.hidden_size = 64
        self.num_hidden_layers = 2
        self.num_attention_heads = 2
        self.is_training = True
        self.tokenizer = train_tokenizer(TEXTS * 4, 300)

    def get_config(self) -> ViPolyQwenConfig:
        vlm = tiny_vlm_config(self.tokenizer, self.hidden_size, self.num_hidden_layers, 32).to_dict()
        del vlm["model_type"]
        vlm["text_config"]["max_position_embeddings"] = 512  # at 8192 stock Qwen2-VL fails the rope tests by rounding
        audio = tiny_audio_config(32, 2)
        audio.apply_spec_augment, audio.layerdrop = False, 0.0
        return ViPolyQwenConfig(**{**vlm, "audio_config": audio, "projection_dim": 48})

    def prepare_config_and_inputs_for_common(self) -> tuple[ViPolyQwenConfig, dict[str, torch.Tensor]]:
        config = self.get_config()
        batch = self.batch_size
        input_ids = torch.randint(20, len(self.tokenizer), (batch, self.seq_length))
        if self.with_images:
            input_ids[:, 2 : 2 + self.patches] = config.image_token_id
        return config, {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            **({"pixel_values": torch.rand(batch * 4 * self.patches, 3 * 2 * 14 * 14)} if self.with_images else {}),
            **({"image_grid_thw": torch.tensor([[1, 4, 4]] * batch)} if self.with_images else {}),
            "audio_features": torch.rand(batch, 3200),
            "audio_attention_mask": torch.ones(batch, 3200, dtype=torch.long),
            "has_audio": torch.ones(batch, dtype=torch.bool),
        }


def make_test_classes(sdist: Path) -> list[type[unittest.TestCase]]:
    """The common mixins of `sdist`, applied to our three classes."""
    sys.path.insert(0, str(sdist))
    from tests.test_configuration_common import ConfigTester  # pyright: ignore[reportMissingImports]
    from tests.test_modeling_common import ModelTesterMixin  # pyright: ignore[reportMissingImports]
    from tests.test_processing_common import ProcessorTesterMixin  # pyright: ignore[reportMissingImports]

    class ConfigTest(unittest.TestCase):
        """Each part of `ConfigTester.run_common_tests` as a test of its own."""

        def setUp(self) -> None:
            self.model_tester = ModelTester(self)
            self.tester = ConfigTester(self, config_class=ViPolyQwenConfig, has_text_modality=False)

    for name in dir(ConfigTester):
        if name.startswith(("create_and_test_", "check_")):
            setattr(ConfigTest, f"test_{name}", lambda self, name=name: getattr(self.tester, name)())

    class ModelTest(ModelTesterMixin, unittest.TestCase):
        all_model_classes = (ViPolyQwenModel,)
        _is_composite = True
        test_can_init_all_missing_weights_before_2023 = True  # else it reads the year from a copyright line

        def setUp(self) -> None:
            torch.manual_seed(0)
            # the tests of attention keep the ids and leave the pixels out, which `forward` refuses
            with_images = not self._testMethodName.startswith("test_eager_matches_sdpa")
            self.model_tester = ModelTester(self, with_images)

    class ProcessorTest(ProcessorTesterMixin, unittest.TestCase):
        processor_class = ViPolyQwenProcessor
        audio_input_name = audio_input_name_values = "audio_features"

        @classmethod
        def _setup_tokenizer(cls) -> Any:
            return train_tokenizer(TEXTS * 4, 300)

        @classmethod
        def _setup_image_processor(cls) -> Any:
            return Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=112 * 112)

        @classmethod
        def _setup_feature_extractor(cls) -> Any:
            return Wav2Vec2FeatureExtractor(return_attention_mask=True)

        def prepare_videos_inputs(self, batch_size: int | None = None) -> None:
            """Our `__call__` names `videos` only to refuse them."""

        def prepare_audio_inputs(self, batch_size: int | None = None) -> Any:
            sound = {"array": np.random.default_rng(0).uniform(-1, 1, 1000), "sampling_rate": 16_000}
            return sound if batch_size is None else [sound] * batch_size

    return [ConfigTest, ModelTest, ProcessorTest]


class Outcomes(unittest.TestResult):
    """Notes what became of each test."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[str, tuple[str, str]] = {}  # name -> (outcome, note)

    def _note(self, test: unittest.TestCase, outcome: str, note: str = "") -> None:
        test = getattr(test, "test_case", test)  # a sub-test counts for its test
        name = f"{type(test).__name__}.{test._testMethodName}"
        if self.rows.get(name, ("pass",))[0] != "fail":
            self.rows[name] = (outcome, note)

    def addSuccess(self, test: unittest.TestCase) -> None:  # noqa: N802
        """Notes a test that passed."""
        self._note(test, "pass")

    def addSkip(self, test: unittest.TestCase, reason: str) -> None:  # noqa: N802
        """Notes a test that says itself that it does not apply."""
        self._note(test, "skip", reason)

    def addFailure(self, test: unittest.TestCase, err: Any) -> None:  # noqa: N802
        """Notes a test that failed."""
        self._note(test, "fail", f"{err[0].__name__}: {' '.join(str(err[1]).split())[:300]}")

    addError = addFailure  # noqa: N815

    def addSubTest(self, test: unittest.TestCase, subtest: unittest.TestCase, err: Any) -> None:  # noqa: N802
        """Notes a part of a test that failed."""
        if err is not None:
            self.addFailure(test, err)


def main() -> int:
    """Runs the tests and prints what became of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sdist", type=Path, help="folder of the unpacked transformers source distribution")
    parser.add_argument("pattern", nargs="?", default="", help="run only tests whose name contains this")
    arguments = parser.parse_args()
    if not (arguments.sdist / "tests" / "test_modeling_common.py").is_file():
        parser.error(f"{arguments.sdist} has no tests/test_modeling_common.py; unpack transformers' sdist there.")
    if transformers.__version__ not in arguments.sdist.resolve().name:
        parser.error(f"{arguments.sdist} is not the source of the installed transformers {transformers.__version__}.")

    torch.set_num_threads(1)
    outcomes = Outcomes()
    with tempfile.TemporaryDirectory() as folder:
        make_stubs(Path(folder))
        register_classes()
        for test_class in make_test_classes(arguments.sdist):
            tests = unittest.defaultTestLoader.loadTestsFromTestCase(test_class)
            unittest.TestSuite(test for test in tests if arguments.pattern in test.id()).run(outcomes)
    return 0 if report(outcomes.rows, REASONS.get) else 1


if __name__ == "__main__":
    sys.exit(main())

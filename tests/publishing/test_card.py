"""The model card: what the metadata claims, where its numbers come from, and that the Hub's validation takes it."""

import ast
import copy
import json
import re
from pathlib import Path

import pytest
from hub_server import go_online, running_hub
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, ModelCardData

from vipolyqwen import __version__
from vipolyqwen.demo.tiny_base import tiny_vlm_config
from vipolyqwen.publishing.card import model_card
from vipolyqwen.publishing.repository import PublishError
from vipolyqwen.training.build import build_model

BACKBONES = ["Qwen/Qwen2-VL-2B-Instruct", "facebook/hubert-base-ls960"]
# The second source has the name of its tasks that runs wrote before they were called so.
TRAINING = {
    "base_models": BACKBONES,
    "settings": {"processes": 4, "learning_rate": 1e-5, "load_best_model_at_end": True},
    "train_data": [
        {"name": "sts.parquet", "on_hub": False, "rows": 900, "weight": 2.0, "tasks": {"text_pair": 900}}
        | {"sides": {"text – text": 800, "image + text – audio": 100}},
        {"name": "someone/speech", "on_hub": True, "rows": 50, "weight": 1.0, "data_types": {"audio": 40, "ocr": 10}},
        {"name": "shards-*.tar", "on_hub": False, "rows": None, "weight": 0.5, "tasks": {}, "sides": {}},
    ],
    "eval_data": [{"name": "dev.jsonl", "on_hub": False, "rows": 7, "weight": 1.0, "tasks": {"audio": 7}}],
    "hardware": "4 × NVIDIA H200",
    "versions": {"torch": "2.13.0"},
}


def evaluation(step: int, recall: float) -> dict:
    values = {"recall@1": recall, "recall@10": 0.9, "mrr": 0.5, "candidates": 7, "chance": 1 / 7, "mean_rank": 2.0}
    scored = {"eval_audio_spearman": 0.25, "eval_recall@1": recall, "eval_mrr": 0.5}
    return {"step": step, **{f"eval_audio_{name}": value for name, value in values.items()}, **scored}


STATE = {
    "global_step": 20,
    "best_global_step": 10,
    "epoch": 2.0,
    "log_history": [{"step": 10, "loss": 1.0}, evaluation(10, 0.75), evaluation(20, 0.5)]
    + [{"step": 20, "train_runtime": 83.4}],
}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """What training leaves behind for the card."""
    (tmp_path / "training.json").write_text(json.dumps(TRAINING))
    (tmp_path / "trainer_state.json").write_text(json.dumps(STATE))
    return tmp_path


def recall(card: ModelCard) -> float:
    [result] = [result for result in card.data.eval_results if result.metric_name == "recall@1"]
    assert (result.dataset_config, result.task_type) == ("audio", "information-retrieval")
    return result.metric_value


def test_the_metadata_says_what_training_wrote_down(tiny: tuple, checkpoint: Path) -> None:
    data = model_card("someone/tiny", *tiny, checkpoint).data
    assert data.base_model == BACKBONES
    assert (data.license, data.language, data.datasets) == ("apache-2.0", ["vi", "en", "zh"], ["someone/speech"])
    assert (data.library_name, data.pipeline_tag) == ("sentence-transformers", "feature-extraction")
    assert {"image", "audio", "custom_code"} <= set(data.tags)
    spearman = [result.metric_value for result in data.eval_results if result.metric_name == "spearman"]
    assert (data.model_name, spearman) == ("tiny", [0.25])


def test_the_text_shows_settings_data_hardware_and_results(tiny: tuple, checkpoint: Path) -> None:
    text = model_card("someone/tiny", *tiny, checkpoint).text
    for line in (
        "| learning_rate | 1e-05 |",
        "| sts.parquet | 900 | 2.0 | text_pair 900 | text – text 800, image + text – audio 100 |",
        "| someone/speech | 50 | 1.0 | audio 40, ocr 10 |  |",
        "| shards-*.tar | streamed | 0.5 |  |  |",
        "20 steps, 2.00 epochs, 83 s.",
        "Hardware: 4 × NVIDIA H200. Software: torch 2.13.0.",
        "| audio | 0.750 | 0.900 | 0.500 | 0.250 | 7 | 0.1429 |",
        "| text | 512 tokens;",
    ):
        assert line in text, line
    assert "built from a configuration" not in text


def test_the_card_tells_what_changed_while_the_model_was_trained(tiny: tuple, checkpoint: Path) -> None:
    changed = {"learning_rate": [1e-2, 1e-6], "freeze": [[], ["vision"]]}
    (checkpoint / "training.json").write_text(json.dumps({**TRAINING, "resumed": [{"step": 20, "changed": changed}]}))
    text = str(model_card("org/name", *tiny, checkpoint))
    line = "The table shows the last settings. From step 20 on: `learning_rate` 1e-06 (before: 0.01); `freeze` "
    assert line in text and text.index(line) < text.index("| data | rows |")
    assert "\n\n| data | rows |" in text


def test_the_card_says_on_which_sides_prompts_stand(tiny: tuple, tmp_path: Path) -> None:
    model, processor = tiny[0], copy.deepcopy(tiny[1])
    processor.add_task("text_pair", "<text_pair>", "both")
    processor.add_task("audio", "<audio>", "none")
    text = model_card("someone/tiny", model, processor, tmp_path).text
    shown = "the prefix of `text_pair` stood on both sides of a pair; the prefix of `instr`, `ocr`, `vqa_single`, "
    assert shown + "`vqa_multi` stood on side a, the query: put prompts there." in " ".join(text.split())


def test_the_results_are_those_of_the_weights_in_the_folder(tiny: tuple, checkpoint: Path) -> None:
    assert recall(model_card("x", *tiny, checkpoint)) == 0.75  # the best step's, which was loaded at the end
    last = checkpoint / "checkpoint-20"
    last.mkdir()
    (last / "trainer_state.json").write_text(json.dumps(STATE))
    card = model_card("x", *tiny, last)
    assert recall(card) == 0.5
    assert card.data.base_model == BACKBONES  # from the run's folder above
    (last / "trainer_state.json").write_text(json.dumps({**STATE, "global_step": 15}))
    card = model_card("x", *tiny, last)
    assert not card.data.eval_results
    assert "was not evaluated on held-out pairs" in card.text


def test_a_metric_that_is_not_defined_is_no_result(tiny: tuple, checkpoint: Path) -> None:
    text = json.dumps(STATE).replace('"eval_audio_spearman": 0.25', '"eval_audio_spearman": NaN')
    (checkpoint / "trainer_state.json").write_text(text)
    card = model_card("x", *tiny, checkpoint)
    assert "spearman" not in {result.metric_name for result in card.data.eval_results}
    assert recall(card) == 0.75 and "nan" not in str(card).lower()


def test_a_model_from_a_configuration_claims_no_backbones(tiny: tuple, tmp_path: Path) -> None:
    card = model_card("someone/tiny", *tiny, tmp_path)
    assert "base_model" not in card.data.to_dict() and "model-index" not in card.data.to_dict()
    assert "built from a configuration" in card.text
    assert "does not record how it was trained" in card.text
    assert f"Published with viPolyQwen {__version__}." in card.text


def test_a_bimodal_model_s_card_does_not_mention_audio(tiny: tuple, tmp_path: Path) -> None:
    processor = tiny[1]
    model = build_model(tiny_vlm_config(processor.tokenizer, 64, 2, 32))
    card = model_card("someone/tiny", model, processor, tmp_path)
    assert "audio" not in card.data.tags
    assert not re.search(r"audio|sound|voice|hubert", card.text.replace("`audio`", ""))  # the task's prompt stays


def test_every_example_is_python_and_names_the_repository_and_its_tag(tiny: tuple, tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", model_card("someone/tiny", *tiny, tmp_path, tag="v7").text, re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        calls = [node for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Call)]
        loads = [call for call in calls if any(keyword.arg == "trust_remote_code" for keyword in call.keywords)]
        assert loads
        for call in loads:
            assert call.args[0].value == "someone/tiny"
            assert {keyword.arg: keyword.value.value for keyword in call.keywords}["revision"] == "v7"


def test_the_hub_s_validation_takes_the_card(tiny: tuple, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = model_card("someone/tiny", *tiny, checkpoint)
    again = ModelCard(str(card))
    assert again.data.to_dict() == card.data.to_dict()
    with running_hub() as hub:
        go_online(monkeypatch, hub)
        api = HfApi(hub.url, "hf_owner")
        api.create_repo("someone/tiny")
        push(api, card)
        card.data.base_model = ["/home/me/model"]
        with pytest.raises(ValueError, match="/home/me/model"):
            push(api, card)
    assert len(hub.paths("POST", "/api/validate-yaml")) == 2


def push(api: HfApi, card: ModelCard) -> None:
    """A commit of the card, which huggingface_hub sends to the Hub's validation first."""
    operation = CommitOperationAdd("README.md", str(card).encode())
    api.create_commit("someone/tiny", [operation], commit_message="card")


def test_an_adapter_s_card_names_the_base(tiny: tuple, checkpoint: Path) -> None:
    card = model_card("someone/tiny", *tiny, checkpoint, adapter_base="someone/base", tag="v1")
    assert isinstance(card.data, ModelCardData)
    assert (card.data.base_model, card.data["base_model_relation"]) == (["someone/base"], "adapter")
    assert "peft" in card.data.tags and "**LoRA adapter** of [someone/base]" in card.text
    assert 'AutoModel.from_pretrained("someone/tiny", trust_remote_code=True)' in card.text


def test_the_card_shows_shorter_vectors_of_the_same_weights_only(tiny: tuple, checkpoint: Path) -> None:
    row = {"dimensions": 256, "precision": "int8", "bytes": 260, "milliseconds": None, "recall@1": 0.625, "mrr": 0.75}
    measured = {"step": 20, "tasks": {"audio": {}, "ocr": {}}, "timed_rows": 20_000, "timed_with": None, "rows": [row]}
    assert "Shorter vectors" not in str(model_card("a", *tiny, checkpoint))
    (checkpoint / "dimensions.json").write_text(json.dumps(measured))
    text = str(model_card("a", *tiny, checkpoint))
    assert "| 256 | int8 | 260 | – | 0.625 | 0.750 |" in text and "2 tasks" in text
    (checkpoint / "dimensions.json").write_text(json.dumps(measured | {"step": 10}))
    with pytest.raises(PublishError, match="step 10.*step 20"):
        model_card("a", *tiny, checkpoint)

"""Suites: what ships resolves in the installed mteb; what is wrong in a file is named, with what may be meant."""

from pathlib import Path
from typing import Any

import datasets
import pytest

mteb = pytest.importorskip("mteb")

from vipolyqwen.evaluation.custom_tasks import KINDS  # noqa: E402
from vipolyqwen.evaluation.suite import SUITES, SuiteError, read_suite  # noqa: E402
from vipolyqwen.evaluation.task_run import suite_tasks  # noqa: E402


def names(suite: str) -> list[str]:
    return [entry["task"] for entry in read_suite(suite).entries if entry["task"] not in KINDS]


def test_all_shipped_suites_are_read() -> None:
    assert sorted(file.stem for file in SUITES.glob("*.yaml")) == [
        "chinese",
        "demo",
        "papers",
        "trimodal",
        "vietnamese",
    ]
    for file in SUITES.glob("*.yaml"):
        assert read_suite(file.stem).entries == read_suite(str(file)).entries


@pytest.mark.parametrize(
    ("suite", "benchmark", "languages"),
    [("vietnamese", "VN-MTEB (vie, v1)", {"vie"}), ("chinese", "MTEB(cmn, v1)", {"zho", "cmn"})],
)
def test_a_scorecard_of_a_language_holds_its_benchmark_and_that_language_alone(
    suite: str, benchmark: str, languages: set[str]
) -> None:
    known = {task.metadata.name for task in mteb.get_benchmark(benchmark).tasks}
    assert known <= set(names(suite))
    read = read_suite(suite)
    tasks = [task for entry in read.entries for task in read.tasks(entry)]
    assert {modality for task in tasks for modality in task.metadata.modalities} == {"text", "image", "audio"}
    for task in tasks:
        scripts = task.metadata.hf_subsets_to_langscripts
        spoken = {code.split("-")[0] for subset in task.hf_subsets for code in scripts[subset]}
        assert spoken & languages, task.metadata.name
        if task.metadata.name not in known:
            assert spoken <= languages, task.metadata.name


def test_the_papers_plan_has_both_directions_of_each_pair_of_modalities() -> None:
    read = read_suite("papers")
    tasks = [mteb.get_task(name) for name in names("papers")]
    categories = [task.metadata.category for task in tasks if task.metadata.type == "Any2AnyRetrieval"]
    assert sorted(categories) == ["a2a", "a2t", "a2t", "i2t", "i2t", "t2a", "t2a", "t2i", "t2i"]
    assert sum(task.metadata.type == "STS" for task in tasks) == 3
    assert {entry["task"] for entry in read.entries} & set(KINDS) == {"sts", "trimodal"}
    assert sum(task.metadata.modalities == ["audio"] for task in tasks) == 4  # for HuBERT
    assert read.baselines == [
        "openai/clip-vit-large-patch14",
        "Qwen/Qwen2-VL-2B-Instruct",
        "facebook/hubert-base-ls960",
        "sentence-transformers/clip-ViT-B-32-multilingual-v1",
        "laion/clap-htsat-fused",
    ]


def test_vists_comes_from_the_hub_by_name_with_its_scores_of_0_to_5(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(path: str, name: str, split: str, revision: str | None) -> datasets.Dataset:
        asked.append((path, name, split))
        rows = {"sentence1": ["một", "hai"], "sentence2": ["số một", "ba"], "score": [4.5, 1.0], "id": [name, "x"]}
        return datasets.Dataset.from_dict(rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    read = read_suite("papers")
    entries = [entry for entry in read.entries if entry.get("path") == "anti-ai/ViSTS"]
    tasks = [task for entry in entries for task in read.tasks(entry)]
    subsets = ["STS-B", "STS12", "STS13", "STS14", "STS15", "STS16", "STS-Sickr"]
    assert asked == [("anti-ai/ViSTS", subset, "test") for subset in subsets]
    assert [task.metadata.name for task in tasks] == [
        *("ViSTS-STSB", "ViSTS-STS12", "ViSTS-STS13", "ViSTS-STS14", "ViSTS-STS15", "ViSTS-STS16", "ViSTS-SICKR")
    ]
    assert [task.metadata.languages for task in tasks] == [["vie"]] * 7
    assert tasks[0].pairs["score"][:] == pytest.approx([0.9, 0.2])
    assert tasks[0].pairs["sentence2"][:] == ["số một", "ba"]


def test_vists_is_skipped_by_name_where_the_hub_is_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("Couldn't reach 'anti-ai/ViSTS' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = [row for row in suite_tasks(read_suite("papers")) if isinstance(row, dict)]
    assert {row["status"] for row in rows} == {"skipped"}
    assert [row["task"] for row in rows if "Couldn't reach" in row["reason"]][0] == "ViSTS-STSB"
    assert [row["task"] for row in rows if "no such file" in row["reason"]] == ["ViSTS", "Trimodal"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("tasks: [STSBenchmarkVN]", "has no task 'STSBenchmarkVN' Did you mean 'STSBenchmark-VN'?"),
        ("tasks: [BIOSSES-VN]\nprompt: {}", "unknown key 'prompt'; known: .* Did you mean 'prompts'?"),
        ("tasks: [{task: BIOSSES-VN, langs: [vie]}]", "unknown key 'langs'; .*Did you mean 'languages'?"),
        (
            "tasks: [{task: sts, name: A, path: a.jsonl, colums: {}}]",
            "unknown key 'colums'; .*Did you mean 'columns'?",
        ),
        ("tasks: [{task: sts, path: a.jsonl}]", "`task: sts` has no name"),
        ("tasks: [{task: sts, name: A}]", "`task: sts` has no path"),
        ("tasks: [BIOSSES-VN, BIOSSES-VN]", r"\['BIOSSES-VN'\] occur twice"),
        (
            "tasks: [BIOSSES-VN]\nprompts: {Retrievl: ocr}",
            "'Retrievl', which is neither .* Did you mean 'Retrieval'?",
        ),
        ("tasks: [BIOSSES-VN]\ndata_types: {}\npair_tasks: {}", "`data_types` .* and `pair_tasks`"),
        ("tasks: [1]", "the entry 1 names no task"),
        ("tasks: []", "has no list of tasks"),
        ("tasks: [", "is not valid YAML"),
    ],
)
def test_a_wrong_suite_is_an_error_that_names_what_is_meant(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(SuiteError, match=message.replace("?", r"\?")):
        read_suite(str(path))


def test_a_suite_in_another_encoding_is_named(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes("tasks: [Thử]".encode("utf-16-le"))
    with pytest.raises(SuiteError, match="mine.yaml is not valid YAML"):
        read_suite(str(path))


def test_an_unknown_suite_is_an_error_that_suggests_one() -> None:
    with pytest.raises(SuiteError, match="Unknown suite 'vietnam'; known: chinese, .* Did you mean 'vietnamese'"):
        read_suite("vietnam")


def test_a_task_without_any_of_the_languages_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("languages: [vie]\ntasks: [XFlickr30kCoI2TRetrieval]", encoding="utf-8")
    suite = read_suite(str(path))
    with pytest.raises(ValueError, match=r"No subsets were found for XFlickr30kCoI2TRetrieval .*\['vie'\]"):
        suite.tasks(suite.entries[0])


def test_old_names_of_pair_tasks_keep_working(tmp_path: Path) -> None:
    path, entry = tmp_path / "mine.yaml", "task: retrieval, name: A, path: a.jsonl"
    declared = "{caption: {prefix: <caption>}}"
    path.write_text(f"data_types: {declared}\ntasks: [{{{entry}, data_type: caption}}]", encoding="utf-8")
    old = read_suite(str(path))
    path.write_text(f"pair_tasks: {declared}\ntasks: [{{{entry}, pair_task: caption}}]", encoding="utf-8")
    assert read_suite(str(path)) == old
    assert old.entries[0]["pair_task"] == "caption"
    assert old.pair_tasks["caption"].prefix == "<caption>"

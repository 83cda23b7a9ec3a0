"""The doctor: an unchanged repository passes, and each silent fault is found and named."""

import copy
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from transformers import AutoModel

from vipolyqwen.demo.tiny_base import tiny_vlm_config
from vipolyqwen.doctor import as_row, diagnose, main
from vipolyqwen.fingerprint_vipolyqwen import (
    FILE_NAME,
    Finding,
    compare_files,
    compare_vector,
    compare_vectors,
    golden_inputs,
    mark,
    read_fingerprint,
    vector_finding,
    verdict,
    write_fingerprint,
)
from vipolyqwen.processing_vipolyqwen import TASK_PREFIXES
from vipolyqwen.publishing.repository import save_repository
from vipolyqwen.training.build import build_model

VECTORS = {"text", "image", "audio", "mix", "prefix", "sentence-transformers"}


@pytest.fixture(scope="module")
def published(tiny: tuple, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published") / "tiny"
    save_repository(*tiny, folder)
    write_fingerprint(folder)
    return folder


@pytest.fixture
def repository(published: Path, tmp_path: Path) -> Path:
    """A copy of the published repository that a test may break."""
    return Path(shutil.copytree(published, tmp_path / "broken"))


def edit_json(path: Path, edit: Callable[[dict], None]) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    edit(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def edit_weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def failures(findings: list[Finding]) -> tuple[set[str], dict[str, str]]:
    """The kinds of vectors that broke, and check -> text of every other fault."""
    failed = {finding.check: finding.text for finding in findings if finding.level == "fail"}
    return failed.keys() & VECTORS, {check: text for check, text in failed.items() if check not in VECTORS}


def test_an_unchanged_repository_passes(published: Path, capsys: pytest.CaptureFixture) -> None:
    assert main([str(published)]) == 0
    printed = capsys.readouterr().out
    assert "FAIL" not in printed and printed.endswith("Everything that matters is as published.\n")
    assert all(f"OK    {check} " in printed for check in VECTORS | {"floors", "keys", "dtype", "weights", "prefixes"})


def test_a_fingerprint_covers_every_tensor_task_and_kind_of_input(tiny: tuple, published: Path) -> None:
    model, _ = tiny
    fingerprint = read_fingerprint(published)
    assert dict(model.named_parameters()).keys() < fingerprint.marks.keys()
    assert {name.split(": ")[0] for name in fingerprint.vectors} == VECTORS - {"sentence-transformers"}
    assert {name for name in fingerprint.vectors if name.startswith("prefix: ")} == {
        f"prefix: {t}" for t in TASK_PREFIXES
    }
    assert all(len(vector) == 1024 for vector in fingerprint.vectors.values())
    assert set(fingerprint.attention) == {"text", "vision", "audio"}


def test_a_fingerprint_is_written_with_the_keys_of_those_already_published(published: Path) -> None:
    stored = json.loads((published / FILE_NAME).read_text(encoding="utf-8"))
    assert " ".join(stored) == "versions dtype attention settings prefix_ids token_ids marks vectors files"
    names = [
        "text: special tokens",
        "text: vi",
        "text: en",
        "text: zh",
        "image: drawing",
        "mix: image + text",
        "audio: tones",
    ]
    names += ["mix: text + audio", "mix: image + text + audio", *(f"prefix: {task}" for task in TASK_PREFIXES)]
    assert sorted(stored["vectors"]) == sorted(names)


# --- five breakages ----------------------------------------------------------------------------------------------


def test_a_missing_tensor_is_named_with_the_kinds_of_input_that_it_breaks(
    repository: Path, capsys: pytest.CaptureFixture
) -> None:
    edit_weights(repository, lambda tensors: tensors.pop("audio_projection.dense.weight"))
    assert main([str(repository)]) == 1
    *_, last = capsys.readouterr().out.strip().splitlines()
    broken, cause = last.split(". ", 1)
    assert broken == "Broken: mix, audio, sentence-transformers"
    assert cause.startswith("Likely cause: [keys] audio_projection.dense.weight not in the files")


@pytest.mark.parametrize(
    ("tensor", "broken"),
    [
        ("vlm.visual.blocks.1.attn.proj.weight", {"image", "mix", "sentence-transformers"}),
        ("audio_tower.encoder.layers.1.feed_forward.output_dense.weight", {"audio", "mix", "sentence-transformers"}),
        ("vlm.language_model.layers.1.mlp.down_proj.weight", VECTORS - {"audio"}),
    ],
)
def test_a_layer_that_was_initialised_anew_is_named(tensor: str, broken: set[str], repository: Path) -> None:
    def initialise(tensors: dict[str, torch.Tensor]) -> None:
        torch.manual_seed(1)
        tensors[tensor] = torch.randn_like(tensors[tensor]) * tensors[tensor].std()

    edit_weights(repository, initialise)
    kinds, causes = failures(diagnose(repository))
    assert kinds == broken
    assert causes.keys() == {"weights"}
    assert causes["weights"].startswith(f"{tensor} hold other values than when published: initialised at random")


def test_weights_that_were_cast_are_told_by_their_dtype(repository: Path) -> None:
    edit_weights(repository, lambda tensors: tensors.update({name: t.bfloat16() for name, t in tensors.items()}))
    edit_json(repository / "config.json", lambda config: config.update(dtype="bfloat16"))
    kinds, causes = failures(diagnose(repository))
    assert kinds == VECTORS
    assert "published in float32, loaded in bfloat16: the weights were cast" in causes["dtype"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_that_were_cast_and_cast_back_are_told_by_their_values(dtype: torch.dtype, repository: Path) -> None:
    edit_weights(repository, lambda tensors: tensors.update({n: t.to(dtype).float() for n, t in tensors.items()}))
    _, causes = failures(diagnose(repository))
    assert causes.keys() == {"weights"}
    assert "rounded values: they were cast to a dtype with fewer digits" in causes["weights"]
    assert "other values" not in causes["weights"]


@pytest.mark.parametrize(
    ("part", "change", "broken"),
    [
        ("image_processor", {"image_mean": [0.5, 0.5, 0.5]}, {"image", "mix", "sentence-transformers"}),
        ("image_processor", {"do_rescale": False}, {"image", "mix", "sentence-transformers"}),
        ("feature_extractor", {"sampling_rate": 8_000}, {"audio", "mix", "sentence-transformers"}),
        ("feature_extractor", {"do_normalize": False}, set()),  # HuBERT-base's group norm undoes it
    ],
)
def test_a_changed_setting_of_the_processor_is_named(
    part: str, change: dict[str, Any], broken: set[str], repository: Path
) -> None:
    edit_json(repository / "processor_config.json", lambda config: config[part].update(change))
    kinds, causes = failures(diagnose(repository))
    assert kinds == broken
    assert causes.keys() == {"processor", "files"}
    assert causes["processor"].startswith(f"{part}.{next(iter(change))} was ")


def swap_in_processor(folder: Path) -> None:
    def swap(config: dict[str, Any]) -> None:
        tasks = config["task_prefixes"]
        tasks["ocr"], tasks["instr"] = tasks["instr"], tasks["ocr"]

    edit_json(folder / "processor_config.json", swap)


def swap_in_tokenizer(folder: Path) -> None:
    def swap(tokenizer: dict[str, Any]) -> None:
        tokens = {token["content"]: token for token in tokenizer["added_tokens"]}
        tokens["<ocr>"]["content"], tokens["<instr>"]["content"] = "<instr>", "<ocr>"

    edit_json(folder / "tokenizer.json", swap)


@pytest.mark.parametrize("swap", [swap_in_processor, swap_in_tokenizer])
def test_swapped_prefix_tokens_are_named(swap: Callable[[Path], None], repository: Path) -> None:
    ids = read_fingerprint(repository).prefix_ids
    swap(repository)
    kinds, causes = failures(diagnose(repository))
    assert "prefix" in kinds and not kinds - {"prefix", "sentence-transformers"}
    assert causes.pop("files").endswith(
        "differ from the published files: restore the files, or publish again if it is meant"
    )
    assert causes == {
        "prefixes": f"instr was {ids['instr']}, is {ids['ocr']}; ocr was {ids['ocr']}, is {ids['instr']}"
    }


# --- what else it looks at ---------------------------------------------------------------------------------------


def test_versions_below_the_repository_s_floors_are_named_with_the_remedy(repository: Path) -> None:
    config = repository / "config_sentence_transformers.json"
    edit_json(config, lambda content: content["requirements"].update({"transformers": ">=99", "nothing-such": ">=1"}))
    _, causes = failures(diagnose(repository))
    assert "needed is >=99: pip install 'transformers>=99'" in causes["floors"]
    assert "nothing-such>=1 is needed and not installed" in causes["floors"]


def test_what_does_not_load_at_all_is_a_diagnosis_too(repository: Path, capsys: pytest.CaptureFixture) -> None:
    (repository / "model.safetensors").write_bytes(b"\0" * 100)
    assert main([str(repository)]) == 1
    assert "It could not be measured. Likely cause: [loading] raises SafetensorError" in capsys.readouterr().out


def test_a_dtype_that_was_asked_for_is_no_fault(published: Path, capsys: pytest.CaptureFixture) -> None:
    assert main([str(published), "--dtype", "bfloat16"]) == 0
    assert "NOTE  dtype " in capsys.readouterr().out


def test_another_attention_is_noted(published: Path) -> None:
    findings = diagnose(published, attn_implementation="eager")
    assert failures(findings) == (set(), {})
    notes = {finding.check: finding.text for finding in findings if finding.level == "note"}
    assert notes == {
        "attention": "; ".join(f"{tower} was 'sdpa', is 'eager'" for tower in ("text", "vision", "audio"))
    }


def test_without_a_fingerprint_there_is_nothing_to_say(repository: Path, capsys: pytest.CaptureFixture) -> None:
    (repository / FILE_NAME).unlink()
    with pytest.raises(SystemExit) as exit_info:
        main([str(repository)])
    assert exit_info.value.code == 2
    assert "has no fingerprint.json" in capsys.readouterr().err


def test_incomplete_weights_get_no_fingerprint(repository: Path) -> None:
    edit_weights(repository, lambda tensors: tensors.pop("pooling.query"))
    with pytest.raises(ValueError, match=r"weights are incomplete: pooling\.query not in the files"):
        write_fingerprint(repository)


def test_a_bimodal_repository_is_measured_without_audio(tiny: tuple, tmp_path: Path) -> None:
    model, processor = tiny
    save_repository(build_model(tiny_vlm_config(processor.tokenizer, 64, 2, 32)), processor, tmp_path)
    write_fingerprint(tmp_path)
    findings = diagnose(tmp_path)
    assert failures(findings) == (set(), {})
    assert {finding.check for finding in findings} & VECTORS == VECTORS - {"audio"}


def test_vectors_without_any_other_fault_point_at_what_else_changed() -> None:
    broken = Finding("image", "fail", "cosine 0.5")
    note = Finding("versions", "note", "pillow was '12', is '13'")
    assert verdict([broken, note]) == "Broken: image. Likely cause: [versions] pillow was '12', is '13'."
    assert "hardware" in verdict([broken])
    assert verdict([note, Finding("image", "ok", "")]) == ""


def test_a_vector_that_differs_or_is_not_of_norm_1_is_named(published: Path) -> None:
    fingerprint = read_fingerprint(published)
    given = np.float32(fingerprint.vectors["text: vi"])

    def judge(vector: np.ndarray) -> Finding:
        return vector_finding("text", compare_vector("text: vi", vector, fingerprint), limit=1e-6)

    assert judge(given).level == "ok"
    moved = given + np.float32(0.1) * np.eye(len(given), dtype=np.float32)[0]
    differs = judge(moved / np.linalg.norm(moved))
    assert differs.level == "fail" and "published vector of 'text: vi'; the limit is 1 - 1e-06" in differs.text
    assert "'text: vi' has norm 1.01, which must be 1" in judge(given * np.float32(1.01)).text
    for broken in (given * np.float32(1.01), given * np.float32(np.nan)):
        assert judge(broken).level == "fail"


def test_code_that_needs_the_package_is_a_fault_though_it_is_installed(published: Path, tmp_path: Path) -> None:
    repository = shutil.copytree(published, tmp_path / "absolute")  # transformers keeps the classes of a name
    path = repository / "modeling_vipolyqwen.py"
    code = path.read_text(encoding="utf-8")
    path.write_text(code.replace("from .packing_vipolyqwen", "from vipolyqwen.packing_vipolyqwen"), encoding="utf-8")
    [*_, finding] = diagnose(repository)
    assert (finding.check, finding.level) == ("loading", "fail")
    assert "vipolyqwen" in finding.text and "vipolyqwen.doctor" in sys.modules


def test_a_mark_tells_rounded_from_replaced() -> None:
    torch.manual_seed(0)
    tensor = torch.randn(300, 70)
    norm, *_ = marks = mark(tensor)
    assert norm == pytest.approx(float(tensor.norm()), rel=1e-6)
    flat = tensor.double().flatten()
    angles = torch.arange(len(flat), dtype=torch.float64) % 4093
    assert marks[1:] == pytest.approx([float(flat @ angles.cos()), float(flat @ angles.sin())], rel=1e-9)

    def change(other: torch.Tensor) -> float:
        return max(abs(a - b) for a, b in zip(mark(other), marks, strict=True)) / norm

    assert change(tensor.clone()) == 0
    assert 1e-6 < change(tensor.half()) < change(tensor.bfloat16()) < 2**-7
    assert change(tensor[torch.randperm(300)]) > 2**-7
    assert change(torch.randn(300, 70)) > 2**-7


# --- files -------------------------------------------------------------------------------------------------------


def edit_text(name: str, before: str, after: str) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        text = (folder / name).read_text(encoding="utf-8")
        assert before in text
        (folder / name).write_text(text.replace(before, after, 1), encoding="utf-8")

    return edit


def set_value(name: str, **values: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / name, lambda content: content.update(values))


def drop_merge(folder: Path) -> None:
    edit_json(folder / "tokenizer.json", lambda content: content["model"]["merges"].pop())


def swap_words(folder: Path) -> None:
    def swap(content: dict) -> None:
        vocabulary = content["model"]["vocab"]
        first, second = list(vocabulary)[-2:]
        vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]

    edit_json(folder / "tokenizer.json", swap)


def add_file(name: str, **content: Any) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(json.dumps(content), encoding="utf-8")


def set_in_config(*path: str, value: Any) -> Callable[[Path], None]:
    def edit(content: dict) -> None:
        for key in path[:-1]:
            content = content[key]
        assert content.get(path[-1]) != value
        content[path[-1]] = value

    return lambda folder: edit_json(folder / "config.json", edit)


def set_in_processor(part: str, **values: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(
        folder / "processor_config.json", lambda content: content.setdefault(part, {}).update(values)
    )


CODE = ("audio", "conversations", "images", "media", "modeling", "packing", "pooling", "processing")
CORRUPTIONS = {
    **{f"code of {name}": edit_text(f"{name}_vipolyqwen.py", "return ", "return  ") for name in CODE},
    "white ground": edit_text("images_vipolyqwen.py", '"white"', '"black"'),
    "share of text": edit_text("processing_vipolyqwen.py", "TEXT_SHARE = 0.25", "TEXT_SHARE = 0.5"),
    "merge": drop_merge,
    "vocabulary": swap_words,
    "normaliser": lambda folder: edit_json(folder / "tokenizer.json", lambda content: content.update(normalizer=None)),
    "similarity": set_value("config_sentence_transformers.json", similarity_fn_name="dot"),
    "prompts": set_value("config_sentence_transformers.json", prompts={"ocr": "Hãy đọc: "}),
    "default prompt": set_value("config_sentence_transformers.json", default_prompt_name="ocr"),
    "URLs": set_value("processor_config.json", allow_urls=True),
    "limits": set_value("processor_config.json", limits={"image_pixels": 10**12}),
    "windows": set_value("processor_config.json", max_audio_windows=1),
    "template": edit_text("chat_template.jinja", "{{ task }}", ""),
    "modules": edit_text("modules.json", "Transformer", "Pooling"),
    "unpadding": set_value("sentence_bert_config.json", unpad_inputs=True),
    "length": set_value("tokenizer_config.json", model_max_length=16),
    "padding side": set_value("tokenizer_config.json", padding_side="left"),
    "fusion": set_value("config.json", audio_fusion="audio"),
    "pooling": set_in_config("pooling", value="mean"),
    "rotary base": set_in_config("text_config", "rope_parameters", "rope_theta", value=5.0),
    "norm": set_in_config("text_config", "rms_norm_eps", value=0.1),
    "activation": set_in_config("text_config", "hidden_act", value="relu"),
    "image token": set_in_config("image_token_id", value=3),
    "architecture": set_in_config("auto_map", "AutoModel", value="packing_vipolyqwen.Packed"),
    "strides of audio": set_in_config("audio_config", "conv_stride", value=[5, 2, 2, 2, 2, 2, 1]),
    "pixels": set_in_processor("image_processor", size={"shortest_edge": 784, "longest_edge": 1568}),
    "mean of pixels": set_in_processor("image_processor", image_mean=[0.0, 0.0, 0.0]),
    "resampling": set_in_processor("image_processor", resample=0),
    "loudness": set_in_processor("feature_extractor", do_normalize=False),
    "rate": set_in_processor("feature_extractor", sampling_rate=8000),
    "sides of prefixes": set_in_processor("prefix_sides", ocr="both"),
    "older image processor": add_file("preprocessor_config.json", size={"shortest_edge": 784}),
    "older tokens": add_file("added_tokens.json", **{"<ocr>": 3}),
    "older special tokens": add_file("special_tokens_map.json", eos_token="<ocr>"),  # noqa: S106
    "adapter": add_file("adapter_config.json", peft_type="LORA"),
    "missing tokenizer": lambda folder: (folder / "tokenizer.json").unlink(),
    "missing code": lambda folder: (folder / "waveforms_vipolyqwen.py").unlink(),
}


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_a_changed_file_is_named(corruption: str, repository: Path) -> None:
    published = read_fingerprint(repository)
    before = {path: path.read_bytes() for path in repository.iterdir()}
    CORRUPTIONS[corruption](repository)
    files = {*before, *repository.iterdir()}
    (changed,) = {path.name for path in files if not path.exists() or path.read_bytes() != before.get(path)}
    (finding,) = compare_files(published, repository)
    assert finding.level == "fail" and changed in finding.text


def test_another_layout_of_a_file_is_no_fault(repository: Path) -> None:
    for path in repository.glob("*.json"):
        content = json.loads(path.read_text(encoding="utf-8"))
        if path.name == "config.json":
            content["transformers_version"] = "9.9"
        if path.name != FILE_NAME:
            path.write_text(json.dumps(content, indent=7), encoding="utf-8")
    for path in repository.glob("*.py"):
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    (finding,) = compare_files(read_fingerprint(repository), repository)
    assert (finding.level, finding.check) == ("ok", "files")
    assert compare_files(replace(read_fingerprint(repository), files={}), repository) == []


def test_a_model_that_was_published_in_bfloat16_is_healthy(tiny: tuple, tmp_path: Path) -> None:
    model, processor = tiny
    save_repository(copy.deepcopy(model).bfloat16(), processor, tmp_path)
    write_fingerprint(tmp_path)
    assert read_fingerprint(tmp_path).dtype == ["bfloat16"]
    assert failures(diagnose(tmp_path)) == (set(), {})


def test_another_class_with_equal_vectors_is_no_fault(repository: Path) -> None:
    edit_json(
        repository / FILE_NAME, lambda content: content["settings"].update(image_processor="Qwen2VLImageProcessor")
    )
    findings = diagnose(repository)
    assert failures(findings) == (set(), {})
    assert "image_processor was 'Qwen2VLImageProcessor'" in {f.check: f.text for f in findings}["classes"]


def test_weights_that_were_trained_on_are_not_called_cast(repository: Path) -> None:
    name = "vlm.language_model.layers.1.mlp.down_proj.weight"
    edit_weights(repository, lambda tensors: tensors[name].add_(1e-3 * torch.randn_like(tensors[name])))
    _, causes = failures(diagnose(repository))
    assert f"{name} hold other values than when published: initialised at random, trained on" in causes["weights"]
    assert "cast" not in causes["weights"]


def test_an_unreachable_hub_is_not_a_missing_fingerprint(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main(["nobody/nothing-of-this-name"])
    error = capsys.readouterr().err
    assert "has no fingerprint.json" not in error and "nobody/nothing-of-this-name" in error


def test_everybody_may_read_the_weights_who_may_read_the_rest(published: Path) -> None:
    assert len({path.stat().st_mode for path in published.iterdir() if path.suffix in (".json", ".safetensors")}) == 1


# --- at load -----------------------------------------------------------------------------------------------------


def test_verify_refuses_at_load_what_is_not_as_published(published: Path, repository: Path) -> None:
    model = AutoModel.from_pretrained(published, trust_remote_code=True, verify=True)
    plain, report = AutoModel.from_pretrained(
        published, trust_remote_code=True, verify=True, output_loading_info=True, dtype=torch.bfloat16
    )
    assert (model.dtype, plain.dtype, report["missing_keys"]) == (torch.float32, torch.bfloat16, set())
    assert not hasattr(model.config, "verify")

    edit_weights(repository, lambda tensors: tensors.pop("audio_projection.dense.weight"))
    with pytest.raises(ValueError, match=r"Broken: mix, audio\. Likely cause: \[keys\] audio_projection"):
        AutoModel.from_pretrained(repository, trust_remote_code=True, verify=True)
    AutoModel.from_pretrained(repository, trust_remote_code=True)  # what stock loading lets pass


def test_verify_works_through_sentence_transformers(repository: Path) -> None:
    def load() -> SentenceTransformer:
        return SentenceTransformer(
            str(repository), trust_remote_code=True, device="cpu", model_kwargs={"verify": True}
        )

    load()
    swap_in_processor(repository)
    with pytest.raises(ValueError, match=r"Broken: prefix\. Likely cause: \[prefixes\] instr was"):
        load()


def test_the_command_runs_as_a_module(repository: Path) -> None:
    swap_in_processor(repository)
    command = [sys.executable, "-m", "vipolyqwen.doctor", str(repository)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stderr[-2000:]
    assert "FAIL  prefixes" in done.stdout


def test_a_model_of_an_earlier_version_without_later_settings_is_compared(tiny: tuple, published: Path) -> None:
    model, processor = tiny
    settings = {name: value for name, value in vars(model.config).items() if name != "towers"}
    config = SimpleNamespace(**settings)
    assert not hasattr(config, "towers")

    def forward(**batch: Any) -> Any:
        return model(**batch)

    forward.config, forward.device = config, model.device
    findings = compare_vectors(read_fingerprint(published), forward, processor, 1e-6)
    assert {finding.level for finding in findings} == {"ok"}


def test_parts_come_in_the_order_that_code_of_earlier_versions_needs(tiny: tuple, tmp_path: Path) -> None:
    """Code published before the order of parts was defined reads a dict in the order of its keys."""
    rows = {name: as_row(arguments, tmp_path) for name, arguments in golden_inputs(tiny[1], has_audio=True).items()}
    assert list(rows["mix: image + text"]) == ["image", "text"]
    assert list(rows["mix: image + text + audio"]) == ["image", "text", "audio"]
    assert list(rows["mix: text + audio"]) == ["text", "audio"]


def test_rounded_weights_get_a_certificate(published: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("torchao")
    main([str(published), "--quantization", "int8"])
    lines = capsys.readouterr().out.splitlines()
    kinds = {line.split()[1]: line for line in lines if "cosine" in line}
    assert set(kinds) == {"text", "image", "audio", "mix", "prefix"}
    assert all("1 - 0.01" in line for line in kinds.values())
    assert "cosine 1.0000000" not in kinds["text"]  # it was rounded


def test_rounding_without_its_library_names_it(
    published: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("vipolyqwen.doctor.is_torchao_available", lambda: False)
    with pytest.raises(SystemExit):
        main([str(published), "--quantization", "int8"])
    assert "pip install torchao" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags",
    [
        ["--quantization", "int3"],
        ["--quantization", "int8", "--dtype", "bfloat16"],
        ["--quantization", "int8", "--attn_implementation", "eager"],
        ["--towers", "video"],
        ["--towers", "text", "--quantization", "int8"],
        ["--against", "http://127.0.0.1:9/v1", "--towers", "text"],
        ["--against", "http://127.0.0.1:9/v1", "--checkpoint", "run"],
    ],
)
def test_no_option_is_ignored(flags: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main(["REPO", *flags])
    assert all(flag in capsys.readouterr().err for flag in flags[:1])


@pytest.mark.parametrize(
    ("towers", "kinds"),
    [(["text"], {"text", "prefix"}), (["text", "image"], {"text", "image", "mix", "prefix"})],
)
def test_a_model_of_some_towers_gets_a_certificate(
    towers: list[str], kinds: set[str], published: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main([str(published), "--towers", *towers]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("NOTE  towers") and "audio" in lines[0]
    assert {line.split()[1] for line in lines if "cosine" in line} == kinds
    assert all(line.startswith("OK") for line in lines if "cosine" in line)


def test_towers_without_text_and_other_vectors_are_named(
    published: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit):
        main([str(published), "--towers", "image"])
    assert "'text' among them" in capsys.readouterr().err
    other = tmp_path / "other"
    shutil.copytree(published, other)
    content = json.loads((other / "fingerprint.json").read_text(encoding="utf-8"))
    content["vectors"]["text: vi"].reverse()
    (other / "fingerprint.json").write_text(json.dumps(content), encoding="utf-8")
    assert main([str(other), "--towers", "text"]) == 1
    assert "FAIL  text " in capsys.readouterr().out

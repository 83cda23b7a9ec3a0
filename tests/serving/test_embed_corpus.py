import json
import os
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from vipolyqwen.data.folder_lock import FolderInUseError, lock_folder
from vipolyqwen.embed_vipolyqwen import main
from vipolyqwen.serving import corpus_run
from vipolyqwen.serving.corpus_run import CorpusOptions, embed_corpus
from vipolyqwen.serving.loading import LoadedModel, fingerprint_of
from vipolyqwen.serving.shards import AnotherModelError, read_manifest, read_vectors

GOOD = ["t0", "t1", "t2", "t3", "t4", "image", "images", "audio", "mix", "path", "token"]


def run(model: LoadedModel, corpus: Path, out: Path, **options: Any) -> corpus_run.Summary:
    given = {"source": {"path": str(corpus)}, "out": out, "unit_rows": 4, "batch_size": 3, **options}
    return embed_corpus(model, CorpusOptions(**given), report=lambda line: None)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def as_encode_takes_it(model: LoadedModel, corpus: Path) -> dict[str, np.ndarray]:
    """The vectors of `encode` for the good rows."""
    folder, plain = corpus.parent, {"chat_template": {"plain_text": True}}
    inputs: dict[str, Any] = {}
    for line in corpus.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["id"] not in GOOD:
            continue
        names = row.get("images", [])
        images = [str(folder / name) for name in ([names] if isinstance(names, str) else names)]
        content = [{"type": "image", "image": image} for image in images]
        if row["id"] == "images":
            content = [content[0], {"type": "text", "text": " hay "}, content[1], {"type": "text", "text": "?"}]
        elif "text" in row:
            content.append({"type": "text", "text": row["text"]})
        if "audio" in row:
            content.append({"type": "audio", "audio": str(folder / row["audio"])})
        inputs[row["id"]] = [{"role": "user", "content": content}]
    return {name: model.encoder.encode([item], processing_kwargs=plain)[0] for name, item in inputs.items()}


def test_vectors_are_those_of_encode_and_bad_rows_are_listed(model: LoadedModel, corpus: Path, tmp_path: Path) -> None:
    summary = run(model, corpus, tmp_path / "out")
    assert (summary.embedded, summary.skipped, summary.bad) == (11, 0, 3)
    ids, vectors = read_vectors(tmp_path / "out")
    assert ids == GOOD
    expected = as_encode_takes_it(model, corpus)
    assert max(np.abs(vector - expected[name]).max() for name, vector in zip(ids, vectors, strict=True)) <= 1e-6
    errors = pq.read_table(tmp_path / "out/errors.parquet").to_pylist()
    assert [(error["id"], error["row"]) for error in errors] == [("empty", 12), ("broken", 13), ("missing", 14)]
    assert "empty" in errors[0]["error"] and "broken.png" in errors[1]["error"] and "missing.png" in errors[2]["error"]


def test_a_run_that_is_cut_off_continues_to_the_same_bytes(
    model: LoadedModel, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(model, corpus, tmp_path / "unbroken")
    write, written = corpus_run.write_shard, []

    def write_two(*arguments: Any) -> None:
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        written.append(arguments[1])
        write(*arguments)

    monkeypatch.setattr(corpus_run, "write_shard", write_two)
    with pytest.raises(OSError, match="No space"):
        run(model, corpus, tmp_path / "out")
    monkeypatch.setattr(corpus_run, "write_shard", write)
    summary = run(model, corpus, tmp_path / "out")
    assert summary.skipped == 8 and summary.embedded + summary.bad == 6
    assert content(tmp_path / "out") == content(tmp_path / "unbroken")
    assert run(model, corpus, tmp_path / "out").skipped == 14


def test_ranks_and_workers_share_the_work(model: LoadedModel, corpus: Path, tmp_path: Path) -> None:
    run(model, corpus, tmp_path / "alone")
    summaries = [run(model, corpus, tmp_path / "shared", rank=rank, ranks=3, workers=rank % 2) for rank in range(3)]
    assert sum(summary.embedded for summary in summaries) == 11
    assert content(tmp_path / "shared") == content(tmp_path / "alone")


@pytest.mark.parametrize(("precision", "limit"), [("float16", 1e-3), ("int8", 0.02), ("binary", 0.7)])
def test_precisions_and_dimensions(
    precision: str, limit: float, model: LoadedModel, corpus: Path, tmp_path: Path
) -> None:
    run(model, corpus, tmp_path / "exact")
    run(model, corpus, tmp_path / "out", precision=precision, dimensions=64)
    exact = read_vectors(tmp_path / "exact")[1][:, :64]
    exact /= np.linalg.norm(exact, axis=1, keepdims=True)
    vectors = read_vectors(tmp_path / "out")[1]
    assert vectors.shape == (11, 64)
    assert np.abs(np.linalg.norm(vectors, axis=1) - 1).max() < 1e-5
    assert np.abs(1 - (vectors * exact).sum(axis=1)).max() < limit
    shard = pq.read_table(next((tmp_path / "out/vectors").glob("*.parquet")))
    assert shard["vector"].type.list_size == (8 if precision == "binary" else 64)
    assert ("scale" in shard.column_names) == (precision == "int8")


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"prompt_name": "ocr"}, "prompt_name"),
        ({"precision": "int8"}, "precision"),
        ({"dimensions": 64}, "dimensions"),
        ({"side": "b"}, "side"),
        ({"unit_rows": 5}, "unit_rows"),
    ],
)
def test_other_vectors_are_refused(options: dict, word: str, model: LoadedModel, corpus: Path, tmp_path: Path) -> None:
    run(model, corpus, tmp_path / "out")
    before = content(tmp_path / "out")
    with pytest.raises(AnotherModelError, match=word):
        run(model, corpus, tmp_path / "out", **options)
    assert content(tmp_path / "out") == before


def test_another_model_and_another_input_are_refused(model: LoadedModel, corpus: Path, tmp_path: Path) -> None:
    run(model, corpus, tmp_path / "out")
    other = LoadedModel(model.encoder, model.name, "0123456789abcdef", model.source)
    with pytest.raises(AnotherModelError, match=f"{model.fingerprint}.*0123456789abcdef"):
        run(other, corpus, tmp_path / "out")
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}', encoding="utf-8")
    with pytest.raises(AnotherModelError, match="another input"):
        run(model, tmp_path / "rows.jsonl", tmp_path / "out")


def test_a_folder_of_a_model_and_a_share_in_work_are_refused(model: LoadedModel, corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoint-2").mkdir(parents=True)
    with pytest.raises(AnotherModelError, match="run holds a model or a run .checkpoint-2"):
        run(model, corpus, tmp_path / "run")
    with lock_folder(tmp_path / "out", "another", f"_rank0-{socket.gethostname()}.lock"):
        with pytest.raises(FolderInUseError, match=f"in use by another .process {os.getpid()}"):
            run(model, corpus, tmp_path / "out")
    assert not (tmp_path / "out" / "vectors").exists()


def test_changed_rows_are_embedded_again(model: LoadedModel, corpus: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f'{{"text": "{word}"}}\n' for word in "abcdef"), encoding="utf-8")
    run(model, path, tmp_path / "out")
    path.write_text("".join(f'{{"text": "{word}"}}\n' for word in "abcdxfg"), encoding="utf-8")
    summary = run(model, path, tmp_path / "out")
    assert (summary.embedded, summary.skipped) == (3, 4)
    assert len(read_vectors(tmp_path / "out")[0]) == 7


def test_the_fingerprint_is_that_of_the_model(repository: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    published = json.loads((repository / "fingerprint.json").read_text(encoding="utf-8"))
    found = []
    for name, value in (("versions", {}), ("prefix_ids", {})):
        (tmp_path / "fingerprint.json").write_text(json.dumps({**published, name: value}), encoding="utf-8")
        found.append(fingerprint_of(str(tmp_path)))
    assert found[0] == fingerprint_of(str(repository)) != found[1]


def test_the_command_reads_columns_and_a_yaml_file(repository: Path, corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("key,body,text\n1,one,x\n2,two,x\n", encoding="utf-8")
    out = [str(repository), str(tmp_path / "rows.csv"), "--device", "cpu", "--text", "body", "--id", "key", "--out"]
    assert main([*out, str(tmp_path / "flags"), "--prompt_name", "instr"]) == 0
    yaml = tmp_path / "source.yaml"
    yaml.write_text(f"path: {tmp_path}/rows.csv\ncolumns: {{a: body, id: key}}\n", encoding="utf-8")
    assert main([str(repository), str(yaml), "--device", "cpu", "--out", str(tmp_path / "yaml")]) == 0
    (ids, prompted), (same_ids, plain) = read_vectors(tmp_path / "flags"), read_vectors(tmp_path / "yaml")
    assert ids == same_ids == ["1", "2"]
    assert np.abs(prompted - plain).max() > 1e-3
    assert read_manifest(tmp_path / "flags")["prompt"] == "<instr>"


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"rank": 2, "ranks": 2}, "rank is 2"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"precision": "int4"}, "int4"),
        ({"dimensions": 2000}, "dimensions is 2000"),
        ({"dimensions": 12, "precision": "binary"}, "multiple of 8"),
        ({"prompt_name": "nothing"}, "nothing"),
    ],
)
def test_wrong_options(options: dict, word: str, model: LoadedModel, corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=word):
        run(model, corpus, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_rows_whose_vector_has_no_direction_are_listed(
    model: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "the longest"}\n{"text": "short"}\n', encoding="utf-8")
    forward = model.encoder.forward

    def spoil(features: dict, **kwargs: Any) -> dict:
        output = forward(features, **kwargs)
        output["sentence_embedding"][0] = 0.0
        return output

    monkeypatch.setattr(model.encoder, "forward", spoil)
    summary = run(model, path, tmp_path / "out")
    assert (summary.embedded, summary.bad) == (1, 1)
    assert read_vectors(tmp_path / "out")[0] == ["rows.jsonl:2"]
    (error,) = pq.read_table(tmp_path / "out/errors.parquet").to_pylist()
    assert error["row"] == 1 and "is 0" in error["error"]


@pytest.mark.parametrize("damage", [b"", b"PAR1 cut off", None])
def test_damaged_and_lost_shards_are_written_anew(
    damage: bytes | None, model: LoadedModel, corpus: Path, tmp_path: Path
) -> None:
    run(model, corpus, tmp_path / "out")
    before = content(tmp_path / "out")
    shard = sorted((tmp_path / "out/vectors").glob("*.parquet"))[1]
    shard.unlink() if damage is None else shard.write_bytes(damage)
    summary = run(model, corpus, tmp_path / "out")
    assert summary.skipped == 10 and content(tmp_path / "out") == before


def test_a_shard_of_another_model_is_refused(model: LoadedModel, corpus: Path, tmp_path: Path) -> None:
    run(model, corpus, tmp_path / "out")
    run(LoadedModel(model.encoder, model.name, "0123456789abcdef", model.source), corpus, tmp_path / "other")
    shard = sorted((tmp_path / "out/vectors").glob("*.parquet"))[0]
    shard.write_bytes((tmp_path / "other/vectors" / shard.name).read_bytes())
    with pytest.raises(AnotherModelError, match=f"{shard.name}.*another model"):
        run(model, corpus, tmp_path / "out")
    with pytest.raises(AnotherModelError, match=f"{shard.name}.*another model"):
        read_vectors(tmp_path / "out")

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from helpers import TEXTS

from vipolyqwen.serving.corpus_run import CorpusOptions, embed_corpus
from vipolyqwen.serving.loading import LoadedModel
from vipolyqwen.serving.shards import AnotherModelError, open_folder, read_vectors, write_shard

pytest.importorskip("faiss")

from vipolyqwen.data.precision import pack
from vipolyqwen.serving import index as index_module
from vipolyqwen.serving.index import build_index, read_index
from vipolyqwen.serving.search import main, search

WIDTH = 32


def write_random(folder: Path, precision: str = "float32", rows: int = 300) -> np.ndarray:
    """A folder of random unit vectors in shards of 100 rows; returns them."""
    vectors = np.random.default_rng(0).standard_normal((rows, WIDTH)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    manifest = {"model": "random", "fingerprint": "00", "dimensions": WIDTH, "precision": precision}
    open_folder(folder, {**manifest, "prompt_name": None, "prompt": None})
    for first in range(0, rows, 100):
        ids = [str(row) for row in range(first, min(first + 100, rows))]
        write_shard(folder, f"part-{first:04d}", "key", ids, *pack(vectors[first : first + 100], precision))
    return vectors


@pytest.mark.parametrize(
    ("precision", "kind", "recall"),
    [
        ("float32", "flat", 1.0),
        ("float16", "flat", 0.99),
        ("int8", "hnsw", 0.95),
        ("int8", "binary", 0.8),
        ("binary", "binary", 0.5),
    ],
)
def test_nearest_rows_by_kind_and_precision(precision: str, kind: str, recall: float, tmp_path: Path) -> None:
    vectors = write_random(tmp_path, precision)
    build_index(tmp_path, kind)
    queries = vectors[::7] + 0.02 * np.random.default_rng(1).standard_normal((43, WIDTH)).astype(np.float32)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    scores, ids = read_index(tmp_path, "00").search(queries, 5)
    exact = np.argsort(-(queries @ vectors.T), axis=1)[:, :5]
    found = np.array(ids).astype(int)
    shared = np.mean([len(set(one) & set(other)) / 5 for one, other in zip(exact, found, strict=True)])
    assert shared >= recall
    assert (np.diff(scores, axis=1) <= 1e-6).all()
    if kind != "binary" or precision != "binary":
        cosines = (vectors[found] * queries[:, None]).sum(axis=2)
        assert np.abs(scores - cosines).max() < 0.02


def test_rescoring_beats_bits_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = write_random(tmp_path)
    build_index(tmp_path, "binary")
    queries = np.roll(vectors[:50], 1, axis=0) + 0.9 * vectors[:50]
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    found = []
    for candidates in (1, 10):
        monkeypatch.setattr(index_module, "CANDIDATES", candidates)
        _, ids = read_index(tmp_path).search(queries, 1)
        found.append(ids)
    best = np.argmax(queries @ vectors.T, axis=1)
    hits = [np.mean([int(one[0]) == row for one, row in zip(ids, best, strict=True)]) for ids in found]
    assert hits[1] > hits[0]


def test_more_rows_than_there_are(tmp_path: Path) -> None:
    write_random(tmp_path, rows=3)
    build_index(tmp_path)
    scores, ids = read_index(tmp_path).search(np.eye(1, WIDTH, dtype=np.float32), 10)
    assert scores.shape == (1, 3) and sorted(ids[0]) == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("shape", "k", "word"), [((1, WIDTH + 1), 1, str(WIDTH)), ((WIDTH,), 1, str(WIDTH)), ((1, WIDTH), 0, "k is 0")]
)
def test_wrong_queries(shape: tuple, k: int, word: str, tmp_path: Path) -> None:
    write_random(tmp_path, rows=3)
    build_index(tmp_path)
    with pytest.raises(ValueError, match=word):
        read_index(tmp_path).search(np.zeros(shape, np.float32), k)


def test_an_index_of_another_model_or_of_other_vectors_is_refused(tmp_path: Path) -> None:
    write_random(tmp_path)
    with pytest.raises(ValueError, match="no index.*serving.index"):
        read_index(tmp_path)
    build_index(tmp_path)
    with pytest.raises(AnotherModelError, match="'random' with fingerprint 00.*11"):
        read_index(tmp_path, "11")
    write_shard(tmp_path, "part-9999", "key", ["new"], np.eye(1, WIDTH, dtype=np.float32), None)
    with pytest.raises(ValueError, match="changed.*serving.index"):
        read_index(tmp_path)
    build_index(tmp_path)
    assert len(read_index(tmp_path).ids) == 301


@pytest.mark.parametrize(("precision", "kind"), [("binary", "flat"), ("float32", "ivf")])
def test_wrong_kinds(precision: str, kind: str, tmp_path: Path) -> None:
    write_random(tmp_path, precision, rows=3)
    with pytest.raises(ValueError, match=kind):
        build_index(tmp_path, kind)


def test_a_folder_without_vectors_has_no_index(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="manifest"):
        build_index(tmp_path)
    write_random(tmp_path, rows=0)
    with pytest.raises(ValueError, match="no vectors"):
        build_index(tmp_path)


@pytest.fixture(scope="module")
def embedded(model: LoadedModel, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("index") / "vectors"
    options: Any = {"source": {"path": str(corpus)}, "out": folder, "unit_rows": 4, "dimensions": 128}
    embed_corpus(model, CorpusOptions(**options), report=lambda line: None)
    build_index(folder)
    return folder


def test_each_row_finds_itself(model: LoadedModel, embedded: Path) -> None:
    scores, ids = search(model, read_index(embedded, model.fingerprint), TEXTS, 3)
    firsts = {"t0": 0, "t3": 3}
    assert {name: ids[number][0] for name, number in firsts.items()} == {"t0": "t0", "t3": "t3"}
    assert np.abs(scores[[0, 3], 0] - 1).max() < 1e-5
    assert len(read_vectors(embedded)[0]) == 11


@pytest.mark.parametrize(
    ("query", "first"), [(["--image", "0.png"], "image"), (["--audio", "0.wav"], "audio"), (["0.png"], "path")]
)
def test_the_command_searches_with_text_image_and_audio(
    query: list[str], first: str, repository: Path, corpus: Path, embedded: Path, capsys: pytest.CaptureFixture
) -> None:
    given = [str(corpus.parent / word) if word.startswith("0.") and len(query) > 1 else word for word in query]
    assert main([str(repository), str(embedded), *given, "--top", "2", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and re.fullmatch(rf"1\.0000  {first}", lines[0])


def test_an_empty_query_is_refused_before_the_model_is_loaded(embedded: Path) -> None:
    with pytest.raises(ValueError, match="--image"):
        main(["missing/model", str(embedded)])


def test_the_settings_say_whose_vectors_they_are(model: LoadedModel, embedded: Path) -> None:
    settings = json.loads((embedded / "index/index.json").read_text(encoding="utf-8"))
    assert (settings["fingerprint"], settings["dimensions"], settings["rows"]) == (model.fingerprint, 128, 11)


def change_manifest(folder: Path, **values: Any) -> None:
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    (folder / "manifest.json").write_text(json.dumps({**manifest, **values}), encoding="utf-8")


@pytest.mark.parametrize(
    "changed", [{"fingerprint": "ff"}, {"dimensions": 16}, {"precision": "int8"}, {"prompt": "<a>"}]
)
def test_vectors_of_two_models_are_never_mixed(changed: dict[str, Any], tmp_path: Path) -> None:
    write_random(tmp_path / "one")
    write_random(tmp_path / "two")
    build_index(tmp_path / "one")
    change_manifest(tmp_path / "one", **changed)  # as if the folder had been moved over another one
    for read in (build_index, read_index, read_vectors):
        with pytest.raises(AnotherModelError, match="mark"):
            read(tmp_path / "one")
    (tmp_path / "two/vectors/part-0300.parquet").write_bytes((tmp_path / "one/vectors/part-0000.parquet").read_bytes())
    assert build_index(tmp_path / "two")["rows"] == 400  # the same manifest
    change_manifest(tmp_path / "two", versions={"torch": "other"})
    assert read_index(tmp_path / "two", "00").settings["rows"] == 400


def test_shards_that_no_run_wrote_are_refused(tmp_path: Path) -> None:
    write_random(tmp_path)
    table = pq.read_table(tmp_path / "vectors/part-0000.parquet").replace_schema_metadata({})
    pq.write_table(table, tmp_path / "vectors/stranger.parquet")
    for read in (build_index, read_vectors):
        with pytest.raises(AnotherModelError, match="stranger.parquet has no mark"):
            read(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"a"', "{}", '{"fingerprint": "00"}'])
def test_a_damaged_manifest_is_named(text: str, tmp_path: Path) -> None:
    write_random(tmp_path)
    (tmp_path / "manifest.json").write_text(text, encoding="utf-8")
    for read in (build_index, read_vectors):
        with pytest.raises(ValueError, match=r"manifest\.json.*damaged"):
            read(tmp_path)


@pytest.mark.parametrize("name", ["index.json", "vectors.faiss", "ids.parquet", "int8.npy"])
def test_a_damaged_index_is_named_with_the_remedy(name: str, tmp_path: Path) -> None:
    write_random(tmp_path)
    build_index(tmp_path, "binary")
    path = tmp_path / "index" / name
    content = path.read_bytes()
    for damaged in (b"", content[: len(content) // 2], None):
        path.write_bytes(damaged) if damaged is not None else path.unlink()
        with pytest.raises(ValueError, match=f"({re.escape(name)}|no index).*build it with"):
            read_index(tmp_path)


@pytest.mark.parametrize("content", [b"", b"PAR1 cut off"])
def test_a_damaged_shard_is_named(content: bytes, tmp_path: Path) -> None:
    write_random(tmp_path)
    (tmp_path / "vectors/part-0100.parquet").write_bytes(content)
    for read in (build_index, read_vectors):
        with pytest.raises(ValueError, match=r"part-0100\.parquet cannot be read.*embed_vipolyqwen"):
            read(tmp_path)


def test_shards_that_are_added_meanwhile_are_left_out_and_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors = write_random(tmp_path)
    count = index_module.count_rows

    def add_one(folder: Path, names: list[str]) -> int:
        write_shard(folder, "part-0050", "key", ["new"], vectors[:1], None)
        return count(folder, names)

    monkeypatch.setattr(index_module, "count_rows", add_one)
    assert build_index(tmp_path, "binary")["rows"] == 300
    with pytest.raises(ValueError, match="changed since the index was built"):
        read_index(tmp_path)


@pytest.mark.parametrize("factor", [0.0, 0.5, float("nan")])
def test_queries_that_are_no_unit_vectors_are_refused(factor: float, tmp_path: Path) -> None:
    vectors = write_random(tmp_path)
    build_index(tmp_path)
    with pytest.raises(ValueError, match="normalise"):
        read_index(tmp_path).search(vectors[:3] * np.float32([[1], [factor], [1]]))


def test_bits_need_a_multiple_of_8(tmp_path: Path) -> None:
    manifest = {"model": "a", "fingerprint": "00", "dimensions": 12, "precision": "float32"}
    open_folder(tmp_path, {**manifest, "prompt_name": None, "prompt": None})
    write_shard(tmp_path, "part", "key", ["a"], np.full((1, 12), 12**-0.5, np.float32), None)
    with pytest.raises(ValueError, match="12 dimensions.*multiple of 8"):
        build_index(tmp_path, "binary")
    assert build_index(tmp_path)["rows"] == 1


@pytest.mark.parametrize("fault", [RuntimeError("write error: No space left on device"), OSError(28, "No space left")])
def test_a_full_disk_leaves_the_earlier_index_and_nothing_else(
    fault: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_random(tmp_path)
    build_index(tmp_path)

    def fail(index: Any, name: str) -> None:
        Path(name).write_bytes(b"part")
        raise fault

    monkeypatch.setattr(index_module.faiss, "write_index", fail)
    with pytest.raises(OSError, match="No space"):
        build_index(tmp_path, "hnsw")
    assert read_index(tmp_path).settings["kind"] == "flat"
    assert not list((tmp_path / "_unfinished").rglob("*"))

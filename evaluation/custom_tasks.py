"""Builds custom tasks of mteb from local pairs: retrieval, STS, six directions between modalities, document pages.

An entry of a suite names a kind, a name and a source of pairs with the keys of a training recipe:

    {task: retrieval, name: Signs, path: dev.jsonl, only: [ocr, vqa_single]}   a task each: side a finds side b
    {task: retrieval, name: Captions, path: dev.jsonl, pair_task: image_caption, both_directions: true}
    {task: sts, name: ViSTS, path: vists.csv, columns: {a: sentence1, b: sentence2, score: similarity}}
    {task: sts, name: ViSTS-STSB, path: anti-ai/ViSTS, subset: STS-B, split: test, score_range: [0, 5], columns: …}
    {task: trimodal, name: Scenes, path: scenes.jsonl, columns: {b: text, images_a: image, audio_a: audio}}
    {task: pages, name: Forms, path: forms.jsonl, query: b}                    the text of side a or b finds its page
"""

import hashlib
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import permutations
from typing import Any, get_args

import datasets
import soundfile
from mteb.abstasks import AbsTask
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData
from mteb.abstasks.sts import AbsTaskSTS
from mteb.abstasks.task_metadata import TaskCategory, TaskMetadata
from mteb.types import PromptType

from ..data.readers import SourceConfig
from ..data.schema import Row, Task
from ..data.sides import MIN_AUDIO_SAMPLES, Side, SidePrompt
from ..data.sources import load_pairs

MODALITIES = ("text", "image", "audio")
CUTOFFS = (1, 5, 10)
MAX_RANKED = 1000  # as in mteb
MIN_SCORE = 0.5  # a pair scored lower is not relevant; its side b stays a candidate
MEDIA = {"image": datasets.Image(), "audio": datasets.Audio()}
LANGUAGES = ("mul-Latn",)  # mteb's code for several languages


class CustomMetadata(TaskMetadata):
    """Metadata of a task whose sides may be of any modality; mteb has a category for some combinations only."""

    sides: dict[str, list[str]] = {}  # "query", "document" -> modalities

    def get_modalities(self, prompt_type: PromptType | None = None) -> list[str]:
        """Returns the modalities of queries or documents, or those of both."""
        return self.sides.get(prompt_type.value, self.modalities) if prompt_type else self.modalities


class CustomRetrieval(AbsTaskRetrieval):
    """Retrieval over local pairs; `retrieval_task` sets `split` and `metadata`."""

    split: RetrievalSplitData
    relevant: list[tuple[int, int]]  # positions of query and document
    prompt_names: dict[str, SidePrompt] = {}  # "query", "document" -> the model's prompt
    k_values = CUTOFFS

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._top_k = min(MAX_RANKED, len(self.split["corpus"]))

    def load_data(self, num_proc: int | None = None, **kwargs: Any) -> None:
        """Assigns the rows, which are already in memory."""
        self.dataset = {"default": {"test": RetrievalSplitData(**self.split)}}
        self.data_loaded = True

    def task_specific_scores(
        self,
        scores: dict[str, dict[str, float]],
        qrels: dict[str, dict[str, int]],
        results: dict[str, dict[str, float]],
        hf_split: str,
        hf_subset: str,
    ) -> dict[str, float]:
        """Returns unrounded scores (mteb rounds to 5 places), the number of candidates, and chance of a hit at 1."""
        queries, candidates = len(scores), len(self.split["corpus"])
        exact = {
            f"{ours}_at_{k}": sum(query[f"{theirs}_{k}"] for query in scores.values()) / queries
            for ours, theirs in (("hit_rate", "success"), ("recall", "recall"), ("ndcg", "ndcg_cut"))
            for k in self.k_values
        }
        return exact | {"candidates": candidates, "chance": len(self.relevant) / queries / candidates}


class CustomSTS(AbsTaskSTS):
    """Similarity of scored pairs of texts; `sts_tasks` sets `pairs` and `metadata`."""

    pairs: datasets.Dataset
    prompt_names: dict[str, SidePrompt] = {}
    min_score, max_score = 0, 1

    def load_data(self, num_proc: int | None = None, **kwargs: Any) -> None:
        """Assigns the rows, which are already in memory."""
        self.dataset = {"default": {"test": self.pairs}}
        self.data_loaded = True


def custom_tasks(entry: Mapping[str, Any], tasks: Mapping[str, Task]) -> list[AbsTask]:
    """Builds the custom tasks of one entry of a suite.

    Args:
        entry: `task` (of `KINDS`), `name`, `languages` (default: several), `only` (tasks of the rows; default: all),
            `both_directions` (retrieval), `query` (pages: a or b), `pair_task` and `subset` (a source's `task` and
            `name` in a recipe), and the other keys of a training recipe's source.
        tasks: the tasks of pairs in the order of their task ids.

    Raises:
        FileNotFoundError: a file of the source does not exist.
        ValueError: a setting or a row is invalid.
    """
    entry = dict(entry)
    kind, name = entry.pop("task"), entry.pop("name")
    settings = {key: entry.pop(key) for key in SETTINGS if key in entry}
    if "subset" in entry:
        entry["name"] = entry.pop("subset")
    if "pair_task" in entry:
        entry["task"] = entry.pop("pair_task")
    elif kind in DEFAULT_TASKS and not {"task_column", "only"} & set(entry):
        entry["task"] = DEFAULT_TASKS[kind]
    only = entry.pop("only", None)
    pairs = load_pairs([entry], tasks, MIN_AUDIO_SAMPLES)
    rows = [row for row in map(pairs.row, range(len(pairs))) if only is None or row.task in only]
    if not rows:
        raise ValueError(f"{name}: {entry['path']} has no rows of {only}; it has {pairs.task_counts()}.")
    placeholder = pairs.sources[0].image_placeholder
    return KINDS[kind](name, rows, placeholder, **settings)


def answer_tasks(
    name: str, rows: list[Row], placeholder: str, languages: Iterable[str] = LANGUAGES, both_directions: bool = False
) -> list[AbsTask]:
    """Builds one task per task of the pairs: side a finds side b, with prompts as in training; also the reverse.

    Sides of different modalities, such as images with and without a question, make separate tasks.
    """
    kinds: dict[str, dict[tuple[tuple[str, ...], tuple[str, ...]], list[Row]]] = {}
    for row in rows:
        modalities = tuple(_side(row, side, placeholder).modalities for side in ("a", "b"))
        kinds.setdefault(row.task, {}).setdefault(modalities, []).append(row)
    tasks = []
    for task, groups in kinds.items():
        for (asked, found), group in groups.items():
            label = f"{name}-{task}" + (f"-{'+'.join(asked)}" if len({a for a, _ in groups}) > 1 else "")
            label += f"-to-{'+'.join(found)}" if len({b for _, b in groups}) > 1 else ""
            sides = [(_side(row, "a", placeholder), _side(row, "b", placeholder)) for row in group]
            relevant = [row.score is None or row.score >= MIN_SCORE for row in group]
            a, b = SidePrompt(task, "a"), SidePrompt(task, "b")
            tasks.append(retrieval_task(label, sides, relevant, {"query": a, "document": b}, languages))
            if both_directions:
                reverse, prompts = [(shown, asked) for asked, shown in sides], {"query": b, "document": a}
                tasks.append(retrieval_task(f"{label}-reverse", reverse, relevant, prompts, languages))
    return tasks


def trimodal_tasks(
    name: str, rows: list[Row], placeholder: str, languages: Iterable[str] = LANGUAGES
) -> list[AbsTask]:
    """Builds six tasks, without prompts: text (of side b, or else a), image and audio of a row find one another."""
    shown = {
        "text": [Side(row.b if row.b.strip() else row.a) for row in rows],
        "image": [Side(images=tuple(row.images_a or row.images_b)) for row in rows],
        "audio": [Side(audio=_audio_file(row.audio_b if row.audio_a is None else row.audio_a)) for row in rows],
    }
    for modality, sides in shown.items():
        missing = [row.id for row, side in zip(rows, sides, strict=True) if side.modalities != (modality,)]
        if missing:
            raise ValueError(
                f"{name}: {len(missing)} rows have no {modality}, the first being {missing[0]!r}; a trimodal row has "
                "a text (column b or a), an image (images_a or images_b) and audio (audio_a or audio_b)."
            )
    everything = [True] * len(rows)
    return [
        retrieval_task(f"{name}-{a}2{b}", list(zip(shown[a], shown[b], strict=True)), everything, {}, languages)
        for a, b in permutations(MODALITIES, 2)
    ]


def page_tasks(
    name: str, rows: list[Row], placeholder: str, languages: Iterable[str] = LANGUAGES, query: str = "a"
) -> list[AbsTask]:
    """Builds one task: the text of side a (a question) or b (the page's text) finds the page, an image of either."""
    if query not in ("a", "b"):
        raise ValueError(f"{name}: query is {query!r}; it must be a or b.")
    several = [row.id for row in rows if len(row.images_a) + len(row.images_b) != 1]
    if several:
        raise ValueError(
            f"{name}: {len(several)} rows do not have one image, e.g. {several[0]!r}; select others with `only`."
        )
    texts = [_side(row, query, placeholder).text.strip() for row in rows]
    if "" in texts:
        row, other = rows[texts.index("")], "b" if query == "a" else "a"
        raise ValueError(f"{name}: side {query} of {row.id!r} has no text; say `query: {other}`, or `only`.")
    sides = [
        (Side(text), Side(images=tuple(row.images_a or row.images_b))) for text, row in zip(texts, rows, strict=True)
    ]
    return [retrieval_task(name, sides, [True] * len(rows), {}, languages, "DocumentUnderstanding")]


def sts_tasks(name: str, rows: list[Row], placeholder: str, languages: Iterable[str] = LANGUAGES) -> list[AbsTask]:
    """Builds one task: Spearman's correlation of cosine and score, without prompts unless the suite names one."""
    text_pair = [("text",), ("text",)]
    wrong = [
        row.id for row in rows if row.score is None or [row.side(side).modalities for side in ("a", "b")] != text_pair
    ]
    if wrong:
        raise ValueError(
            f"{name}: {len(wrong)} rows are not two texts and a score, e.g. {wrong[0]!r}; select others with `only`."
        )
    pairs = datasets.Dataset.from_dict(
        {
            "sentence1": [row.a for row in rows],
            "sentence2": [row.b for row in rows],
            "score": [row.score for row in rows],
        }
    )
    revision = _revision(repr([(row.a, row.b, row.score) for row in rows]))
    texts = {"query": ["text"], "document": ["text"]}
    metadata = _metadata(name, "STS", texts, "cosine_spearman", revision, languages)
    return [type("CustomSTS", (CustomSTS,), {"metadata": metadata, "pairs": pairs})()]


KINDS: dict[str, Callable[..., list[AbsTask]]] = {
    "retrieval": answer_tasks,
    "sts": sts_tasks,
    "trimodal": trimodal_tasks,
    "pages": page_tasks,
}
DEFAULT_TASKS = {"sts": "text_pair", "trimodal": "audio", "pages": "ocr"}  # of rows without a task
SETTINGS = ("languages", "both_directions", "query")
ENTRY_KEYS = ("task", "pair_task", "name", "subset", "only", *SETTINGS, *SourceConfig.__dataclass_fields__)


def retrieval_task(
    name: str,
    pairs: list[tuple[Side, Side]],
    relevant: list[bool],
    prompt_names: dict[str, SidePrompt],
    languages: Iterable[str],
    task_type: str | None = None,
) -> AbsTask:
    """Builds a task in which each distinct query with a relevant document searches all distinct documents.

    Args:
        name: of the task.
        pairs: query and document of each row; all queries have the same modalities, and so do all documents.
        relevant: per row whether the document is relevant to the query.
        prompt_names: the model's prompt for "query" and "document"; an absent side has none.
        languages: mteb's codes, such as "vie-Latn".
        task_type: of mteb; by default derived from the modalities.
    """
    documents = {document.key(): document for _, document in pairs}
    position = {key: number for number, key in enumerate(documents)}
    queries, found = {}, {}
    for (query, document), belongs in zip(pairs, relevant, strict=True):
        if belongs:
            queries[query.key()] = query
            found.setdefault(query.key(), set()).add(position[document.key()])
    if not queries:
        raise ValueError(f"{name}: no pair is relevant; all {len(pairs)} are scored below {MIN_SCORE}; check them.")
    asked, shown = next(iter(queries.values())).modalities, next(iter(documents.values())).modalities
    matches = [(number, document) for number, key in enumerate(queries) for document in sorted(found[key])]
    qrels: dict[str, dict[str, int]] = {f"q{number}": {} for number in range(len(queries))}
    for number, document in matches:
        qrels[f"q{number}"][f"d{document}"] = 1
    split = RetrievalSplitData(
        queries=_table("q", list(queries.values()), asked),
        corpus=_table("d", list(documents.values()), shown),
        relevant_docs=qrels,
        top_ranked=None,
    )
    sides = {"query": list(asked), "document": list(shown)}
    revision = _revision(repr((list(queries), list(documents), matches)))
    metadata = _metadata(name, task_type or _task_type(asked, shown), sides, "hit_rate_at_1", revision, languages)
    fields = {"metadata": metadata, "split": split, "relevant": matches, "prompt_names": prompt_names}
    return type("CustomRetrieval", (CustomRetrieval,), fields)()


def _side(row: Row, name: str, placeholder: str) -> Side:
    """Returns a side; placeholders stay in a text with several images, where the encoder uses them, or without any."""
    content = row.side(name)
    text = content.text.replace(placeholder, "").strip() if len(content.images) == 1 else content.text
    return Side(text, tuple(content.images), _audio_file(content.audio))


def _audio_file(audio: str | bytes | dict[str, Any] | None) -> str | bytes | None:
    """Returns samples as the content of a WAV file; a path or content unchanged."""
    if not isinstance(audio, dict):
        return audio
    buffer = io.BytesIO()
    soundfile.write(buffer, audio["array"], audio["sampling_rate"], format="WAV", subtype="FLOAT")
    return buffer.getvalue()


def _letters(modalities: Sequence[str]) -> str:
    """Returns the side's letters in mteb's categories: "it" is an image with a text."""
    return "".join(modality[0] for modality in ("image", "audio", "text") if modality in modalities)


def _task_type(asked: tuple[str, ...], shown: tuple[str, ...]) -> str:
    if asked == shown == ("text",):
        return "Retrieval"
    return "VisionCentricQA" if (asked, shown) == (("text", "image"), ("text",)) else "Any2AnyRetrieval"


def _table(letter: str, sides: list[Side], modalities: tuple[str, ...]) -> datasets.Dataset:
    """Returns one row per side: `id` and a column per modality; several images are a list."""
    columns: dict[str, list[Any]] = {"id": [f"{letter}{number}" for number in range(len(sides))]}
    if "text" in modalities:
        columns["text"] = [side.text for side in sides]
    if "image" in modalities:
        is_single = all(len(side.images) == 1 for side in sides)
        columns["image"] = [side.images[0] if is_single else list(side.images) for side in sides]
    if "audio" in modalities:
        columns["audio"] = [side.audio for side in sides]
    return media_table(columns, {modality: modality for modality in modalities})


def media_table(columns: Mapping[str, list[Any]], modalities: Mapping[str, str]) -> datasets.Dataset:
    """Returns a data set whose images and audio are paths or contents of files, decoded on access.

    Casts media columns: encoding them would require torchcodec.

    Args:
        columns: column -> values; of media a path, the content of a file, or a list of these.
        modalities: column -> `text`, `image` or `audio`; other columns are kept as they are.
    """
    media = {column: MEDIA[modality] for column, modality in modalities.items() if modality in MEDIA}
    stored = {column: [_stored(value) for value in columns[column]] for column in media}
    table = datasets.Dataset.from_dict({**columns, **stored})
    for column, feature in media.items():
        table = table.cast_column(column, datasets.List(feature) if isinstance(columns[column][0], list) else feature)
    return table


def _stored(source: str | bytes | list[str | bytes]) -> dict[str, Any] | list[dict[str, Any]]:
    if isinstance(source, list):
        return [_stored(part) for part in source]
    return {"bytes": source, "path": None} if isinstance(source, bytes) else {"bytes": None, "path": source}


def _revision(content: str) -> str:
    """Returns a hash of the content, so that cached results never belong to other pairs."""
    return hashlib.blake2b(content.encode(), digest_size=8).hexdigest()


def _metadata(
    name: str,
    task_type: str,
    sides: dict[str, list[str]],
    main_score: str,
    revision: str,
    languages: Iterable[str],
) -> TaskMetadata:
    category = "2".join(_letters(side) for side in sides.values())
    return CustomMetadata(
        name=name,
        description="Local pairs, read with the keys of a training recipe.",
        type=task_type,
        category=category if category in get_args(TaskCategory) else None,
        modalities=[modality for modality in MODALITIES if any(modality in side for side in sides.values())],
        sides=sides,
        dataset={"path": f"local/{name}", "revision": revision},
        eval_splits=["test"],
        eval_langs=list(languages),
        main_score=main_score,
        is_public=False,
    )

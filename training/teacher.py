"""Gives training pairs the vectors of a teacher: from their columns, or computed once and cached on disk."""

import hashlib
import importlib
import inspect
import re
from collections.abc import Callable, Sequence
from importlib.metadata import packages_distributions, version
from pathlib import Path
from types import ModuleType

import datasets
import numpy as np
import pyarrow as pa
import torch
from accelerate import PartialState
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError
from tqdm.auto import tqdm
from transformers.utils import logging

from ..data.readers import CODE, RowReader
from ..data.sources import PairDataset, content_key
from ..data.vector_cache import VectorCache

logger = logging.get_logger(__name__)

PART = 4096  # texts between two writes to the cache
CALLABLE = re.compile(r"[\w.]+:\w+")
SIDES = ("a", "b")
THIS_CODE = hashlib.blake2b(Path(__file__).read_bytes(), digest_size=16).hexdigest()
Teacher = Callable[[list[str]], np.ndarray]  # n texts -> (n, W) float


class SideFacts:
    """Reads what the teacher needs to know of rows; `Dataset.map` caches the result under a hash of these fields."""

    def __init__(self, reader: RowReader) -> None:
        self.reader, self.code = reader, CODE + THIS_CODE

    def __call__(self, table: pa.Table) -> dict[str, list[int]]:
        """Returns for each side the width of its vector and the key of its text if it has text only; 0 for none."""
        found: dict[str, list[int]] = {f"{name}_{side}": [] for name in ("width", "key") for side in SIDES}
        for record in table.to_pylist():
            row, _ = self.reader.read(record)
            for side, vector in zip(SIDES, (row.teacher_a, row.teacher_b), strict=True):
                text = row.only_text(side)
                found[f"width_{side}"].append(0 if vector is None else len(vector))
                found[f"key_{side}"].append(0 if text is None else content_key(text))
        return found


def teach_pairs(
    pairs: PairDataset, tasks: Sequence[str], teacher: str | None, prompt: str | None, device: torch.device
) -> int:
    """Gives the pairs a teacher, and checks that every row of some tasks has its vector of at least one side.

    Vectors in the columns `teacher_a` and `teacher_b` come first. A teacher fills in the sides of text only; all
    ranks share the work.

    Args:
        pairs: pairs to train on, which are given the computed vectors.
        tasks: tasks with a weight of distil.
        teacher: name or path of a sentence-transformers model, or `module:function`, which embeds a list of n texts
            as (n, W) numbers; `None` for vectors in columns only.
        prompt: put before every text, such as "query: "; only for a model.
        device: device of the model.

    Returns:
        W, the dimensions of the teacher's vectors.

    Raises:
        RowError: a row has no vector, or one of another width or that is not finite.
        ValueError: the teacher cannot be loaded.
    """
    every = pairs.unfolded()  # any entry of a list may be drawn
    widths, keys = _read_facts(every)  # (rows, 2) each
    keys[widths > 0] = 0
    keys[~np.isin(every.task_ids, [list(pairs.tasks).index(task) for task in tasks])] = 0
    if teacher is not None and keys.any():
        pairs.teacher, pairs.taught_tasks = _computed(every, keys, teacher, prompt, device), tuple(tasks)
        widths = np.where(keys != 0, pairs.teacher.width, widths)
    _check_widths(every, tasks, widths, teacher)
    return int(widths.max())


def _read_facts(pairs: PairDataset) -> tuple[np.ndarray, np.ndarray]:
    """Returns the widths of the vectors in columns, (rows, 2) int64, and the keys of text-only sides, likewise."""
    features = {f"{name}_{side}": datasets.Value("int64") for name in ("width", "key") for side in SIDES}
    columns: dict[str, list[np.ndarray]] = {name: [] for name in features}
    for piece in pairs.pieces:
        facts = piece.table.map(
            SideFacts(piece.reader),
            batched=True,
            batch_size=256,
            remove_columns=piece.table.column_names,
            features=datasets.Features(features),
            desc=f"Looking for a teacher's vectors in {piece.reader.file}",
        ).with_format("arrow")[:]
        for name, values in columns.items():
            values.append(facts[name].to_numpy())
    joined = {name: np.concatenate(values) for name, values in columns.items()}
    widths, keys = (np.stack([joined[f"{name}_{side}"] for side in SIDES], axis=1) for name in ("width", "key"))
    return widths, keys


def _check_widths(pairs: PairDataset, tasks: Sequence[str], widths: np.ndarray, teacher: str | None) -> None:
    """Raises RowError for the first row without any vector, and for the first vector of another width."""
    taught = np.isin(pairs.task_ids, [list(pairs.tasks).index(task) for task in tasks])
    lacking = np.flatnonzero(taught & ~widths.any(axis=1))
    if len(lacking):
        row, place = pairs.row(lacking[0]), pairs.place(lacking[0])
        remedy = "name a `teacher`, fill in a column" if teacher is None else "fill in a column"
        raise place.error(
            "teacher_a",
            None,
            f"{len(lacking)} rows, this one of {row.task!r} first, have no teacher's vector of side a or b; {remedy}, "
            f"or give only other tasks a weight in `distil` (now {', '.join(tasks)}).",
        )
    if not widths.any():
        raise ValueError(f"No row of the tasks of `distil` ({', '.join(tasks)}) is in the data; leave `distil` out.")
    places = np.argwhere(widths > 0)
    expected = widths[tuple(places[0])]
    for index, side in places[widths[tuple(places.T)] != expected]:
        raise pairs.place(index).error(
            f"teacher_{SIDES[side]}",
            int(widths[index, side]),
            f"the number of dimensions differs from the {expected} of {pairs.row(places[0][0]).id!r}; embed all rows "
            "with one teacher.",
        )


def _computed(
    pairs: PairDataset, keys: np.ndarray, teacher: str, prompt: str | None, device: torch.device
) -> VectorCache:
    """Returns the cache with the vectors of all texts that `keys`, (rows, 2), names; 0 names none."""
    cache = VectorCache(cache_folder(teacher, prompt))
    wanted, first = np.unique(keys.ravel(), return_index=True)
    wanted, first = wanted[wanted != 0], first[wanted != 0]
    state = PartialState()
    for rank, ranks in ((state.process_index, state.num_processes), (0, 1)):  # the second without a shared disk
        missing = np.flatnonzero(cache.lacks(wanted))
        state.wait_for_everyone()  # no rank writes before all have looked
        mine = missing[rank::ranks]
        if len(mine):
            _fill(cache, pairs, wanted[mine], first[mine], load_teacher(teacher, prompt, device), teacher)
        state.wait_for_everyone()
        cache.reload()
    return cache


def _fill(
    cache: VectorCache, pairs: PairDataset, keys: np.ndarray, sides: np.ndarray, embed: Teacher, teacher: str
) -> None:
    """Embeds the texts of some sides (2 · row, + 1 for b) and adds them to the cache, part by part."""
    logger.info(f"The teacher {teacher} embeds {len(keys):,} texts, cached in {cache.folder}.")
    width = cache.width
    for start in tqdm(range(0, len(keys), PART), desc="Teacher", disable=len(keys) <= PART, unit="part"):
        part = sides[start : start + PART]
        texts = [str(pairs.row(side // 2).only_text(SIDES[side % 2])) for side in part]
        vectors = np.asarray(embed(texts), dtype=np.float32)
        fault = _fault(vectors, len(texts), width)
        if fault is not None:
            position, problem = fault
            place = pairs.place(part[position] // 2)
            raise place.error(SIDES[part[position] % 2], texts[position], f"the teacher {teacher} {problem}.")
        width = vectors.shape[1]
        cache.add(keys[start : start + PART].tolist(), vectors)


def _fault(vectors: np.ndarray, texts: int, width: int) -> tuple[int, str] | None:
    """Returns the position of the first bad vector of a teacher, and what is wrong; `None` if all are good."""
    if vectors.ndim != 2 or len(vectors) != texts or vectors.shape[1] == 0:
        return 0, f"returned shape {vectors.shape} for {texts} texts; it must return ({texts}, dimensions)"
    if width and vectors.shape[1] != width:
        return 0, f"returned {vectors.shape[1]} dimensions, but {width} before; delete its cache or name another one"
    bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1) | ~vectors.any(axis=1))
    if len(bad):
        return int(bad[0]), "returned a vector that is 0 or not finite; drop the row, or name another teacher"
    return None


def load_teacher(name: str, prompt: str | None, device: torch.device) -> Teacher:
    """Loads a sentence-transformers model or imports `module:function`; see `teach_pairs`."""
    if _is_callable(name):
        return getattr(_import_teacher(name), name.partition(":")[2])
    from sentence_transformers import SentenceTransformer  # takes seconds to import

    try:
        model = SentenceTransformer(name, device=str(device))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"The teacher {name!r} cannot be loaded: {error}. Give the name or path of a sentence-transformers model, "
            "or `module:function`."
        ) from error
    return lambda texts: model.encode(texts, prompt=prompt, show_progress_bar=False)


def cache_folder(teacher: str, prompt: str | None) -> Path:
    """Returns the folder of a teacher's vectors below the cache of `datasets`; another teacher has another folder."""
    if _is_callable(teacher) and prompt is not None:
        raise ValueError(f"teacher_prompt is {prompt!r}, but {teacher} is a function; let it add the prompt.")
    parts = (teacher, prompt, _fingerprint(teacher))
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()
    return Path(datasets.config.HF_DATASETS_CACHE) / "vipolyqwen_teacher" / digest


def _is_callable(name: str) -> bool:
    return CALLABLE.fullmatch(name) is not None and not Path(name).exists()


def _import_teacher(name: str) -> ModuleType:
    module_name, _, function = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(
            f"The teacher {name!r} cannot be imported: {error}. Install its package, or put its folder on PYTHONPATH."
        ) from error
    if not callable(getattr(module, function, None)):
        raise ValueError(f"The teacher {name!r}: {module_name} has no function {function!r}; correct the name.")
    return module


def _fingerprint(teacher: str) -> str:
    """Identifies a teacher without loading it.

    A function by the source and the version of its module, a folder by the content of its files, a model of the Hub by
    its commit.
    """
    if _is_callable(teacher):
        module = _import_teacher(teacher)
        source = Path(str(inspect.getsourcefile(module))).read_bytes()
        packages = packages_distributions().get(module.__name__.partition(".")[0], [])
        return hashlib.sha256(source).hexdigest() + repr([(name, version(name)) for name in sorted(packages)])
    if Path(teacher).is_dir():
        digest = hashlib.sha256()
        for file in sorted(path for path in Path(teacher).rglob("*") if path.is_file()):
            with file.open("rb") as content:
                digest.update(file.relative_to(teacher).as_posix().encode())
                digest.update(hashlib.file_digest(content, "sha256").digest())
        return digest.hexdigest()
    return _commit(teacher)


def _commit(name: str) -> str:
    """Returns the commit of a model of the Hub, which names the folder of its downloaded files."""
    reasons = []
    for full_name in [name] if "/" in name else [f"sentence-transformers/{name}", name]:
        for file in ("modules.json", "config.json"):
            try:
                return Path(hf_hub_download(full_name, file)).parent.name
            except (EntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
                reasons.append(str(error))
    raise ValueError(
        f"The teacher {name!r} is neither a folder nor found on the Hub ({reasons[-1]}); correct the name, or give "
        "`module:function`."
    )

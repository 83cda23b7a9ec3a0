"""The output folder of a run: one run at a time writes to it, and none replaces another by accident."""

import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from accelerate.utils import gather_object
from transformers import TrainerState
from transformers.utils import logging

from ..data.atomic import UNFINISHED
from ..data.folder_lock import lock_folder
from ..publishing.repository import ADAPTER_CONFIG, SENTENCE_TRANSFORMERS_FILES, TRAINING_FILE
from .adapters import ADAPTER, BASE
from .arguments import ViPolyQwenTrainingArguments
from .checkpoints import SUPERSEDED, list_checkpoints, step_of

logger = logging.get_logger(__name__)

CARD, FINGERPRINT = "README.md", "fingerprint.json"  # of a published repository
# Files of a run or a repository that cannot be recovered. `training.json` is written before the first step: alone, it
# is left by a run that failed early.
MODEL_FILES = ("config.json", ADAPTER_CONFIG, "modules.json", "trainer_state.json", FINGERPRINT)
WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
OTHER_FILES = (TRAINING_FILE, "train_results.json", "eval_results.json", "all_results.json", "processor_config.json")
OTHER_FILES += ("model.safetensors.index.json", *SENTENCE_TRANSFORMERS_FILES)


@contextmanager
def occupy(args: ViPolyQwenTrainingArguments, inputs: Iterable[str]) -> Iterator[None]:
    """Holds the output folder inside the context; every rank raises if a rank may not write to it.

    Args:
        args: `output_dir`, `overwrite_output_dir` and `resume_from_checkpoint`.
        inputs: paths that the run reads: model, backbones, data.

    Raises:
        ValueError: the folder is in use, or holds another run or a repository, which is not to be overwritten.
        OSError: the folder cannot be written.
    """
    with ExitStack() as stack:
        failure = None
        if args.should_save:
            try:
                stack.enter_context(lock_folder(Path(args.output_dir), "train_vipolyqwen.py"))
                make_room(args, inputs)
            except (ValueError, OSError) as error:
                failure = error
        failures = [each for each in gather_object([failure]) if each is not None]
        if failures:
            raise failures[0]
        yield


def make_room(args: ViPolyQwenTrainingArguments, inputs: Iterable[str]) -> None:
    """Refuses an output folder that holds another run or a repository; `overwrite_output_dir` deletes those first."""
    folder = Path(args.output_dir)
    found = find_results(folder)
    if not found or resumes_inside(folder, args.resume_from_checkpoint):
        return
    if not args.overwrite_output_dir:
        kind = "a published repository" if (folder / FINGERPRINT).is_file() else "another run"
        raise ValueError(
            f"`output_dir` is {str(folder)!r}, which holds {kind} ({_listed(found)}). Choose another folder, continue "
            "that run with `--resume_from_checkpoint true` if it has checkpoints, or delete it with "
            "`--overwrite_output_dir`."
        )
    for path in inputs:
        if Path(path).exists() and _deletes(folder, Path(path)):
            raise ValueError(
                f"`overwrite_output_dir` would delete {path!r}, which this run reads. Choose another `output_dir` "
                f"than {str(folder)!r}."
            )
    logger.warning(f"Overwriting {folder}: {_listed(found)} are deleted.")
    delete_results(folder)


def find_results(folder: Path) -> list[str]:
    """Lists the checkpoints, weights and other files in a folder that a new run would replace."""
    names = [checkpoint.name for checkpoint in list_checkpoints(folder)]
    names += [name for name in MODEL_FILES if (folder / name).is_file()]
    names += [path.name for pattern in WEIGHTS for path in sorted(folder.glob(pattern))]
    return names + [name for name in (ADAPTER,) if (folder / name).is_dir()]


def resumes_inside(folder: Path, resume: str | bool | None) -> bool:
    """Returns whether a run resumes from a checkpoint in its output folder."""
    if isinstance(resume, str):
        return Path(resume).resolve().parent == folder.resolve()
    return bool(resume) and bool(list_checkpoints(folder))


def delete_results(folder: Path) -> None:
    """Deletes what runs and publication write; other files stay."""
    card = [CARD] if (folder / FINGERPRINT).is_file() else []
    files = [folder / name for name in (*MODEL_FILES, *OTHER_FILES, *card)]
    for path in [*files, *(path for pattern in WEIGHTS for path in folder.glob(pattern))]:
        path.unlink(missing_ok=True)
    for path in [*list_checkpoints(folder), *(folder / name for name in (BASE, ADAPTER, UNFINISHED, SUPERSEDED))]:
        shutil.rmtree(path, ignore_errors=True)


def describe_result(args: ViPolyQwenTrainingArguments, state: TrainerState) -> str:
    """Says at the end of a run where the model is, of which step its weights are, and which checkpoints there are."""
    folder, best = Path(args.output_dir), state.best_model_checkpoint
    of_step = f"of step {state.global_step}"
    if args.load_best_model_at_end and best is not None:
        metric = f"{args.metric_for_best_model} {state.best_metric:.4g}"
        of_step = f"of step {state.best_global_step}, the best by {metric}"
    kept = ", ".join(str(step_of(checkpoint)) for checkpoint in list_checkpoints(folder))
    checkpoints = f" Checkpoints of steps {kept} are there too." if kept else ""
    return f"Trained to step {state.global_step}. The model is in {folder}, with the weights {of_step}.{checkpoints}"


def _deletes(folder: Path, path: Path) -> bool:
    """Returns whether `delete_results` would delete `path`, or a part of it."""
    folder, path = folder.resolve(), path.resolve()
    if path == folder:
        return True
    first = path.relative_to(folder).parts[0] if path.is_relative_to(folder) else ""
    return re.fullmatch(rf"checkpoint-\d+|{BASE}|{ADAPTER}|{UNFINISHED}", first) is not None


def _listed(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")

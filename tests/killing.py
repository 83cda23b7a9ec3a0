"""Kills training runs with SIGKILL at random moments, and resumes them: for test_resume.py and benchmarks/kill.py."""

import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env
from safetensors.torch import load_file

from vipolyqwen.train_vipolyqwen import main as train_main
from vipolyqwen.training.checkpoints import UNFINISHED, find_faults
from vipolyqwen.training.distributed import end_process_group

CONFIGS = Path(__file__).parents[1] / "recipes" / "launch"
STEPS, SAVE_STEPS = 8, 3
FLAGS = ["--max_steps", str(STEPS), "--save_steps", str(SAVE_STEPS), "--save_total_limit", "1"]
FLAGS += ["--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2", "--eval_strategy", "no"]
FLAGS += ["--load_best_model_at_end", "false", "--task_weighting", "gradnorm"]
WRITING_SECONDS = 0.04  # about as long as writing a tiny model's checkpoint takes
SAVED = [*range(SAVE_STEPS, STEPS, SAVE_STEPS), STEPS]

processes = multiprocessing.get_context("forkserver")  # each run is a process of its own that need not import all anew
processes.set_forkserver_preload(["vipolyqwen.training.build", "vipolyqwen.training.trainer"])


@dataclass
class Moment:
    """When a run is killed: a share of the run's duration after its start, or of a checkpoint's writing."""

    share: float
    writing: int | None = None  # the step whose checkpoint is being written


def draw_moments(seed: int) -> Iterator[Moment]:
    """Without end; every second one while a checkpoint is written."""
    rng = np.random.default_rng(seed)
    for number in count():
        yield Moment(rng.uniform(), int(rng.choice(SAVED)) if number % 2 else None)


def train_quietly(argv: list[str]) -> None:
    """What a process runs."""
    torch.set_num_threads(1)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    train_main(argv)


def start(recipe: Path, output: Path, *flags: str) -> multiprocessing.Process:
    """Starts a run."""
    process = processes.Process(
        target=train_quietly, args=([str(recipe), "--output_dir", str(output), *FLAGS, *flags],)
    )
    process.start()
    return process


def train_as_rank(argv: list[str], environment: dict[str, str]) -> None:
    """What a rank of a sharded run on CPUs runs; see training/launching.py."""
    os.environ.update(environment)
    PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)
    train_quietly(argv)
    end_process_group()
    os._exit(0)  # as `run_on_rank` of tests/helpers.py


def start_ranks(recipe: Path, output: Path, *flags: str, ranks: int = 2) -> list[multiprocessing.Process]:
    """Starts a run under FSDP2, without a launcher that would end the other ranks when one is killed."""
    launch = ["--config_file", str(CONFIGS / "fsdp2.yaml"), "--num_processes", str(ranks), "train_vipolyqwen.py"]
    options, *_ = _validate_launch_command(launch_command_parser().parse_args(launch))
    environment = prepare_multi_gpu_env(options)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {name: value for name, value in environment.items() if name.startswith(("FSDP", "ACCELERATE"))}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(ranks)}
    common |= {"ACCELERATE_TORCH_DEVICE": "cpu", "LOCAL_WORLD_SIZE": str(ranks)}
    argv = [str(recipe), "--output_dir", str(output), *FLAGS, "--use_cpu", "false", *flags]
    started = []
    for rank in range(ranks):
        variables = common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        started.append(processes.Process(target=train_as_rank, args=(argv, variables)))
        started[-1].start()
    return started


def warm_up() -> None:
    """Has the server that starts the runs import all that they need, which is not to count as a run's time."""
    process = processes.Process(target=time.time)
    process.start()
    process.join()


def train_uninterrupted(recipe: Path, output: Path) -> float:
    """Trains from beginning to end; returns the seconds."""
    warm_up()
    started = time.monotonic()
    process = start(recipe, output)
    process.join()
    assert process.exitcode == 0
    return time.monotonic() - started


def kills(recipe: Path, folder: Path, seed: int, duration: float) -> Iterator[tuple[str, Path]]:
    """Without end: what a killed run left, and the folder of its resumed end; one that ended before does not count."""
    for number, moment in enumerate(draw_moments(seed)):
        left = kill_and_resume(recipe, folder / str(number), moment, duration)
        if left is not None:
            yield left, folder / str(number)


def kill_and_resume(recipe: Path, output: Path, moment: Moment, duration: float) -> str | None:
    """Kills a run, checks what it leaves, and lets another go on to the end.

    Returns:
        What was left, or `None` if the run had come to its end before.
    """
    process = start(recipe, output)
    begun = time.monotonic()
    if moment.writing is not None:
        while process.is_alive() and not (output / UNFINISHED / f"checkpoint-{moment.writing}").exists():
            time.sleep(0.001)
    delay = moment.share * (duration if moment.writing is None else WRITING_SECONDS)
    process.join(delay)
    process.kill()
    process.join()
    if process.exitcode != -signal.SIGKILL:
        assert process.exitcode == 0
        return None
    begun = time.monotonic() - begun
    checkpoints = sorted(path.name for path in output.glob("checkpoint-*"))
    unfinished = sorted(path.name for path in (output / UNFINISHED).glob("*"))
    assert all(not find_faults(output / name) for name in checkpoints), checkpoints
    resumed = start(recipe, output, "--resume_from_checkpoint", "true")
    resumed.join()
    assert resumed.exitcode == 0
    assert not (output / UNFINISHED).exists() or not list((output / UNFINISHED).iterdir())
    return f"killed after {begun:.2f} s: whole {checkpoints}, unfinished {unfinished}"


def same_weights(one: Path, other: Path) -> bool:
    """Whether the models that two runs left are equal bit by bit."""
    first, second = (load_file(folder / "model.safetensors") for folder in (one, other))
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)

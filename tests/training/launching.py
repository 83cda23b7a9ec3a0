"""One process of `accelerate launch`, for test_launch.py: takes several training runs one after another.

    accelerate launch … launching.py RUNS.json   # a list of lists of words, as train_vipolyqwen.py takes them
    accelerate launch … launching.py RUNS.json GRADIENTS   # and leaves DeepSpeed's gradients of every step in a folder

Accelerate shards (FSDP2, DeepSpeed) only where it finds an accelerator. Here it is told that the CPU is one, so that
all above torch's collectives (wrapping, optimizer, checkpoints, loading) is what runs on GPUs.
"""

import json
import os
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType

from vipolyqwen.train_vipolyqwen import main
from vipolyqwen.training.distributed import end_process_group


def keep_gradients(folder: Path) -> None:
    """Has DeepSpeed write the gradient of every parameter to a file before each step."""
    from deepspeed import DeepSpeedEngine  # only some machines have it  # pyright: ignore[reportMissingImports]
    from deepspeed.utils import safe_get_full_grad  # pyright: ignore[reportMissingImports]

    step = DeepSpeedEngine.step

    def keep_and_step(engine: DeepSpeedEngine) -> None:
        parameters = {name: value for name, value in engine.module.named_parameters() if value.requires_grad}
        gradients = {name: safe_get_full_grad(value).clone() for name, value in parameters.items()}  # collectives
        if PartialState().is_main_process:
            torch.save(gradients, folder / f"{len(list(folder.iterdir()))}.pt")
        step(engine)

    DeepSpeedEngine.step = keep_and_step


if __name__ == "__main__":
    torch.set_num_threads(1)
    if "ACCELERATE_USE_FSDP" in os.environ or "ACCELERATE_USE_DEEPSPEED" in os.environ:
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
        PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)
    if len(sys.argv) > 2:
        keep_gradients(Path(sys.argv[2]))
    for argv in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        main(argv)
    end_process_group()
    os._exit(0)  # as `run_on_rank` of tests/helpers.py

"""One process of `accelerate launch`, for test_launch.py: takes several training runs one after another.

    accelerate launch … launching.py RUNS.json   # a list of lists of words, as train_vipolyqwen.py takes them

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

if __name__ == "__main__":
    torch.set_num_threads(1)
    if "ACCELERATE_USE_FSDP" in os.environ or "ACCELERATE_USE_DEEPSPEED" in os.environ:
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
        PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)
    for argv in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        main(argv)

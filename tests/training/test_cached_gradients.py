"""Cached gradients: the same gradients from chunks as from the whole batch, in one process and in several."""

import gc
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import EVERYTHING as EVERY_OPTION
from helpers import (
    KEY_BIAS,
    assert_same_gradients,
    build_trainer,
    gradients_of,
    run_on_two_ranks,
    train_run,
    training_step,
)
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer

from vipolyqwen.configuration_vipolyqwen import ViPolyQwenConfig
from vipolyqwen.data.sources import PairDataset
from vipolyqwen.modeling_vipolyqwen import ViPolyQwenModel
from vipolyqwen.processing_vipolyqwen import ViPolyQwenProcessor
from vipolyqwen.publishing.repository import save_repository
from vipolyqwen.training import trainer as trainer_vipolyqwen
from vipolyqwen.training.arguments import read_arguments
from vipolyqwen.training.trainer import ViPolyQwenTrainer

ON_SIDE_B = [  # media on side b: found by text, by an image, by audio; among hard negatives
    {"task": "instr", "a": "Hình nào?", "b": "", "images_b": ["0.png"], "negatives": [{"images": "1.png"}]},
    {"task": "instr", "a": "Which one?", "b": "<image> or <image>", "images_b": ["2.png", "0.png"]},
    {"task": "ocr", "a": "", "images": ["1.png"], "audio_b": "1.wav", "negative_audio": ["0.wav", "2.wav"]},
    {"task": "audio", "audio": "2.wav", "audio_b": "3.wav"},
    {"task": "audio", "audio": "0.wav", "b": "nghe", "images_b": "3.png", "audio_b": "2.wav"},
]
EVERYTHING = [*EVERY_OPTION, "--distil", "0.5", "--teacher_temperature", "0.3"]


@pytest.fixture(scope="module")
def corpus(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs of `world`: wrong answers, a teacher, texts beside audio, and windows; its base fuses by attention."""
    folder = tmp_path_factory.mktemp("corpus")
    rows = [json.loads(line) for line in (world / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = [
        row
        | {"negatives": [f"no {n} {k}" for k in range(n % 3)], "group": f"g{n % 5}"}
        | ({"a": "nghe"} if row["task"] == "audio" and n % 4 == 1 else {})
        for n, row in enumerate(rows)
    ]
    assert {row["a"] for row in rows if row["task"] == "audio"} == {"", "nghe"}
    rows += [{"id": f"b{n}", **row} for n, row in enumerate(ON_SIDE_B)]
    for number, row in enumerate(rows):
        row |= {
            f"teacher_{side}": [math.sin(number), 0.5, math.cos(3 * number)] for side in ("a", "b", "ab")[number % 3]
        }
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    model = ViPolyQwenModel.from_pretrained(world / "base", audio_fusion="attention")
    torch.manual_seed(0)
    torch.nn.init.normal_(model.audio_fusion.out.weight, std=0.02)
    processor = ViPolyQwenProcessor.from_pretrained(world / "base", config=model.config)
    processor.max_audio_seconds = 0.25  # of clips of 0.2 … 0.5 s
    save_repository(model, processor, folder / "base")
    (folder / "media").symlink_to(world)
    return folder


def test_the_pairs_have_texts_beside_audio_and_clips_of_several_windows(corpus: Path) -> None:
    trainer, pairs = build_trainer(corpus)
    batch = trainer.data_collator(list(pairs))
    assert set(batch["audio_windows"].tolist()) == {1, 2}
    both = batch["has_audio"].bool() & (batch["attention_mask"].sum(dim=1) > 0)
    assert 0 < both.sum() < batch["has_audio"].sum()


def without_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same chunks with all of their activations kept: ordinary gradients."""
    keep_all = lambda embed, chunks, *_, **__: torch.cat([embed(chunk) for chunk in chunks])  # noqa: E731
    monkeypatch.setattr(trainer_vipolyqwen, "embed_in_chunks", keep_all)


# --- one process


@pytest.fixture(scope="module", params=[[], EVERYTHING], ids=["plain", "everything"])
def whole_batch(corpus: Path, request: pytest.FixtureRequest) -> tuple[list[str], dict[str, Tensor], dict[str, Any]]:
    """Flags, and gradients and log of a step of all rows without chunks."""
    trainer, pairs = build_trainer(corpus, *request.param)
    log = training_step(trainer, list(pairs))
    return request.param, gradients_of(trainer), log


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_chunks_give_the_gradients_and_the_log_of_the_whole_batch(corpus: Path, whole_batch: Any, size: int) -> None:
    flags, gradients, log = whole_batch
    trainer, pairs = build_trainer(corpus, *flags, "--embed_chunk", str(size))
    found_log = training_step(trainer, list(pairs))
    assert_same_gradients(gradients_of(trainer), gradients)
    assert found_log == pytest.approx(log, rel=1e-4, abs=1e-6)
    assert any(name.startswith("gradient_cosine/") for name in log)
    assert ("loss.log_temperatures" in gradients) == bool(flags)


def test_rows_pass_in_small_chunks_first_all_without_gradient_then_all_with_it(corpus: Path) -> None:
    trainer, pairs = build_trainer(corpus, "--embed_chunk", "3")
    calls = []
    trainer.model.register_forward_pre_hook(
        lambda _, __, inputs: calls.append((torch.is_grad_enabled(), len(inputs["input_ids"]))), with_kwargs=True
    )
    batch = trainer.data_collator([row for row in pairs if row["audio_a"] is None and row["audio_b"] is None])
    rows = len(batch["attention_mask"])
    trainer.training_step(trainer.model, batch)
    first, second = calls[: len(calls) // 2], calls[len(calls) // 2 :]
    assert {with_gradient for with_gradient, _ in first} == {False}
    assert {with_gradient for with_gradient, _ in second} == {True}
    assert [size for _, size in first] == [size for _, size in second]
    assert sum(size for _, size in first) == rows and max(size for _, size in first) == 3


def test_both_passes_drop_the_same_activations(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ViPolyQwenConfig.from_pretrained(corpus / "base")
    config.text_config.attention_dropout = 0.3
    for name in ("hidden_dropout", "attention_dropout", "activation_dropout", "feat_proj_dropout"):
        setattr(config.audio_config, name, 0.3)

    def run(seed: int) -> tuple[dict[str, Tensor], Tensor]:
        model = ViPolyQwenModel.from_pretrained(corpus / "base", config=config)
        trainer, pairs = build_trainer(corpus, "--embed_chunk", "3", model=model)
        batch = trainer.data_collator(list(pairs))
        torch.manual_seed(seed)
        loss = trainer.compute_loss(trainer.model.train(), batch)
        torch.rand(1)  # what anything else draws is not drawn again
        loss.backward()
        return gradients_of(trainer), torch.get_rng_state()

    found, state = run(0)
    without_cache(monkeypatch)
    wanted, wanted_state = run(0)
    other = run(1)[0]
    assert_same_gradients(found, wanted)
    assert torch.equal(state, wanted_state)  # the next step draws what it would draw without chunks
    for part in ("audio_projection.dense.weight", "vlm.language_model.layers.0.self_attn.v_proj.weight"):
        assert (other[part] - wanted[part]).norm() > 0.1 * wanted[part].norm()


@pytest.mark.parametrize("backward_inside", [False, True])
def test_both_passes_have_the_same_autocast(
    corpus: Path, backward_inside: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(dtype: torch.dtype, cache: bool = False) -> dict[str, Tensor]:
        trainer, pairs = build_trainer(corpus, "--embed_chunk", "3")
        # of two windows in two calls the cached copy of a weight would add up gradients in bfloat16
        trainer.processing_class.max_audio_seconds = 1.0
        batch = trainer.data_collator(list(pairs))
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32, cache_enabled=cache):
            loss = trainer.compute_loss(trainer.model, batch)
            if backward_inside:
                loss.backward()
        if not backward_inside:
            loss.backward()
        return gradients_of(trainer)

    found, in_float32 = run(torch.bfloat16, cache=True), run(torch.float32)
    without_cache(monkeypatch)
    wanted = run(torch.bfloat16)
    assert found.keys() == wanted.keys()
    for name in wanted.keys() - {KEY_BIAS}:
        assert (found[name] - wanted[name]).norm() <= 1e-5 * wanted[name].norm(), name
        assert (in_float32[name] - wanted[name]).norm() > 1e-4 * wanted[name].norm(), name


def test_a_run_with_chunks_ends_where_a_run_without_ends(world: Path, tmp_path: Path) -> None:
    flags = ["--optim", "sgd", "--gradient_accumulation_steps", "2", "--max_steps", "2", "--save_strategy", "no"]
    flags += ["--load_best_model_at_end", "false", "--max_grad_norm", "0"]
    logs = {
        name: train_run(world, tmp_path / name, *flags, *chunk)
        for name, chunk in {"plain": [], "chunks": ["--embed_chunk", "5"]}.items()
    }
    for plain, chunks in zip(logs["plain"][:-1], logs["chunks"][:-1], strict=True):
        assert plain.keys() == chunks.keys()
        same = {name: value for name, value in plain.items() if not name.endswith(("_per_second", "_runtime"))}
        assert {name: chunks[name] for name in same} == pytest.approx(same, rel=1e-3, abs=1e-5)
    base = load_file(world / "base" / "model.safetensors")
    plain, chunks = (load_file(tmp_path / name / "model.safetensors") for name in logs)
    moved = sum((plain[name] - base[name]).square().sum() for name in base if base[name].shape == plain[name].shape)
    apart = sum((plain[name] - chunks[name]).square().sum() for name in plain)
    assert moved > 0
    assert apart.sqrt() <= 1e-4 * moved.sqrt()


def test_a_chunk_without_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="`embed_chunk` is 0; give a number of rows >= 1"):
        read_arguments(["--model", "x", "--output_dir", "x", "--use_cpu", "true", "--embed_chunk", "0"])


@pytest.fixture
def deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainers that believe they run under DeepSpeed."""
    create = Trainer.create_accelerator_and_postprocess

    def create_for_deepspeed(self: Trainer) -> None:
        create(self)
        self.is_deepspeed_enabled = True

    monkeypatch.setattr(Trainer, "create_accelerator_and_postprocess", create_for_deepspeed)


def test_updates_cannot_be_left_out_with_deepspeed(corpus: Path, deepspeed: None) -> None:
    with pytest.raises(ValueError, match="`on_nan` is skip, but DeepSpeed"):
        build_trainer(corpus, "--on_nan", "skip")


# --- several processes: rank 0 has text only, rank 1 images and sounds on both sides, and more rows


def rows_of(pairs: PairDataset, rank: int) -> list[dict[str, Any]]:
    rows = [pairs[number] for number in range(len(pairs))]
    media = ("images_a", "images_b", "audio_a", "audio_b")
    text_only = [row for row in rows if not any(row[name] for name in media)]
    return text_only[:5] if rank == 0 else [row for row in rows if any(row[name] for name in media)]


def sharded(model: ViPolyQwenModel) -> nn.Module:
    """FSDP2 over two processes, layer by layer."""
    mesh = init_device_mesh("cpu", (2,))
    for module in model.modules():
        if type(module).__name__ in model._no_split_modules:
            fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


class CountReductions(TorchDispatchMode):
    """Counts the collectives that sum over processes."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.count += str(func).startswith("c10d.") and "reduce" in str(func)
        return func(*args, **(kwargs or {}))


WRAPPERS: dict[str, Callable[[ViPolyQwenModel], nn.Module]] = {"ddp": DistributedDataParallel, "fsdp2": sharded}
CASES = [(wrapper, chunk, batches) for wrapper in WRAPPERS for chunk, batches in ((None, 1), (3, 1), (3, 2))]
CASES += [(wrapper, "60 tokens, packed", 1) for wrapper in WRAPPERS]
CHUNK_FLAGS = {
    None: [],
    3: ["--embed_chunk", "3"],
    "60 tokens, packed": ["--embed_chunk_tokens", "60", "--packing", "true"],
}


def accumulate(trainer: ViPolyQwenTrainer, rows: list[dict[str, Any]], model: nn.Module) -> None:
    """A batch before the last one of a step: its gradients stay in each process."""
    trainer.accelerator.gradient_state._set_sync_gradients(False)
    if isinstance(model, DistributedDataParallel):
        with model.no_sync():
            training_step(trainer, rows, model)
    else:
        model.set_requires_gradient_sync(False)
        training_step(trainer, rows, model)
        model.set_requires_gradient_sync(True)
    trainer.accelerator.gradient_state._set_sync_gradients(True)


def learn_from_unlike_gradients(trainer: ViPolyQwenTrainer, rank: int) -> Tensor:
    """The temperature after a step, for which the processes have gradients of opposite signs."""
    temperature = trainer.mixed_loss.log_temperatures
    temperature.grad = torch.ones_like(temperature) * (3 - 4 * rank)  # the mean is 1
    optimizer = trainer.accelerator.prepare_optimizer(trainer.create_optimizer())
    trainer.loss_optimizer.on_optimizer_step(trainer.args, trainer.state, trainer.control, optimizer=optimizer)
    return temperature.detach()


def take_steps(rank: int, folder: Path) -> None:
    """Runs in each of two processes; the first leaves gradients, log and number of reductions of every case."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT="0")
    for case in CASES:
        take_step(rank, folder, *case)
        gc.collect()  # ends the reducers and shards of the case while no collective runs
        dist.barrier()
    trainer, _ = build_trainer(folder, *EVERYTHING)
    torch.save(learn_from_unlike_gradients(trainer, rank), folder / f"learned-{rank}.pt")


def take_step(rank: int, folder: Path, name: str, chunk: int | str | None, batches: int) -> None:
    trainer, pairs = build_trainer(folder, *EVERYTHING, *CHUNK_FLAGS[chunk])
    model, rows = WRAPPERS[name](trainer.model), rows_of(pairs, rank)
    for _ in range(batches - 1):
        accumulate(trainer, rows, model)
    with CountReductions() as reductions:
        log = training_step(trainer, rows, model)
    gradients = gradients_of(trainer)
    if rank == 0:
        torch.save((gradients, log, reductions.count), folder / f"{name}-{chunk}-{batches}.pt")


@pytest.fixture(scope="module")
def one_process(corpus: Path) -> dict[int, tuple[dict[str, Tensor], dict[str, Any]]]:
    """Gradients and log of joined batches, by their number, after two processes have left theirs in the folder."""
    run_on_two_ranks(take_steps, corpus, corpus)
    trainer, pairs = build_trainer(corpus, *EVERYTHING)
    found = {}
    for batches in (1, 2):
        log = training_step(trainer, [*rows_of(pairs, 0), *rows_of(pairs, 1)])
        found[batches] = {name: value.clone() for name, value in gradients_of(trainer).items()}, log
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("wrapper", "chunk", "batches"), CASES)
def test_processes_without_a_modality_and_with_uneven_rows_have_the_gradients_of_one(
    wrapper: str, chunk: int | str | None, batches: int, corpus: Path, one_process: dict[int, tuple[dict, dict]]
) -> None:
    gradients, log, reductions = torch.load(corpus / f"{wrapper}-{chunk}-{batches}.pt")
    wanted, wanted_log = one_process[batches]
    assert_same_gradients(gradients, wanted)
    assert log == pytest.approx(wanted_log, rel=1e-4, abs=1e-6)
    assert reductions == torch.load(corpus / f"{wrapper}-None-1.pt")[2]  # once a step, not once a chunk


@pytest.mark.slow
def test_what_the_loss_learns_stays_the_same_in_all_processes(corpus: Path, one_process: dict[int, Any]) -> None:
    first, second = (torch.load(corpus / f"learned-{rank}.pt") for rank in (0, 1))
    assert torch.equal(first, second) and first < math.log(0.07)

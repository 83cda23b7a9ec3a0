"""Training through the real command: recipes, one mixed batch, checkpoints, resuming, several processes."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import TEXTS, train_run
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer

from vipolyqwen.data.collator import MixedBatchCollator
from vipolyqwen.data.schema import Task, declare_tasks
from vipolyqwen.data.sides import prefix_sides
from vipolyqwen.data.sources import load_pairs
from vipolyqwen.demo.tiny_base import build_tiny_base
from vipolyqwen.evaluation.search import searches
from vipolyqwen.microbatches_vipolyqwen import take_rows
from vipolyqwen.training.arguments import launched_on_cpu, read_arguments, read_recipe
from vipolyqwen.training.build import build_loss, build_tasks
from vipolyqwen.training.run_record import write_record
from vipolyqwen.training.trainer import ViPolyQwenTrainer

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def trained(world: Path) -> tuple[Path, list[dict]]:
    """One run of the recipe and its log."""
    return world / "run", train_run(world, world / "run")


def test_every_component_of_every_task_is_logged(trained: tuple[Path, list[dict]]) -> None:
    logged = {name for entry in trained[1] for name in entry}
    for name in ("text_pair/nce", "text_pair/mse", "text_pair/rank", "instr/cosine", "ocr/triplet", "vqa_single/nce"):
        assert f"loss/{name}" in logged
    for name in ("vqa_multi/triplet", "audio/nce", "audio/cosine", "audio/triplet", "caption/nce", "caption/cosine"):
        assert f"loss/{name}" in logged
    assert {"weight/text_pair", "pairs_per_second", "tokens_per_second", "grad_norm"} <= logged


def test_evaluation_gives_retrieval_for_each_task_and_spearman_for_scored_pairs(
    trained: tuple[Path, list[dict]],
) -> None:
    evaluated = next(entry for entry in trained[1] if "eval_recall@1" in entry)
    for task in ("text_pair", "instr", "ocr", "vqa_single", "vqa_multi", "audio"):
        for metric in ("recall@1", "recall@5", "recall@10", "mrr", "candidates", "chance"):
            assert math.isfinite(evaluated[f"eval_{task}_{metric}"])
    assert -1 <= evaluated["eval_text_pair_spearman"] <= 1


def test_a_checkpoint_is_a_repository_that_sentence_transformers_loads(trained: tuple[Path, list[dict]]) -> None:
    checkpoint = str(trained[0] / "checkpoint-4")
    vectors = SentenceTransformer(checkpoint, trust_remote_code=True).encode(["xin chào", "hello"], prompt_name="ocr")
    assert vectors.shape == (2, 1024)
    assert "caption" in SentenceTransformer(checkpoint, trust_remote_code=True).prompts
    assert not list(trained[0].glob("**/training_args.bin"))


def test_a_checkpoint_says_where_prefixes_stood_and_evaluation_puts_prompts_there(
    world: Path, trained: tuple[Path, list[dict]]
) -> None:
    sides = {name: task.prefix_sides for name, task in declare_tasks(None).items()} | {"caption": "a"}
    saved = json.loads((trained[0] / "processor_config.json").read_text(encoding="utf-8"))
    assert saved["prefix_sides"] == sides
    model = SentenceTransformer(str(trained[0] / "checkpoint-4"), device="cpu", trust_remote_code=True)
    assert prefix_sides(model) == sides
    pair, instr = searches(load_pairs([{"path": str(world / "pairs.jsonl")}], declare_tasks(None), 400), 0.5)[:2]
    for search, on_b in ((pair, "text_pair"), (instr, None)):
        texts = [side.text for side in search.candidates]
        wanted = torch.from_numpy(model.encode(texts, prompt_name=on_b))
        torch.testing.assert_close(search.embed_candidates(model), wanted)
        asked = torch.from_numpy(model.encode([side.text for side in search.queries], prompt_name=search.task))
        torch.testing.assert_close(search.embed_queries(model), asked)


def test_a_run_records_the_facts_of_its_model_card_and_no_path(world: Path, trained: tuple[Path, list[dict]]) -> None:
    text = (trained[0] / "training.json").read_text(encoding="utf-8")
    assert str(world) not in text
    record = json.loads(text)
    assert record["base_models"] == [] and "continued_from" not in record  # a tiny base in a folder
    tasks = ("text_pair", "instr", "ocr", "vqa_single", "vqa_multi", "audio")
    pairs = {"name": "pairs.jsonl", "on_hub": False, "rows": 24, "weight": 1.0, "tasks": dict.fromkeys(tasks, 4)}
    captions = {"name": "captions.jsonl", "on_hub": False, "rows": 8, "weight": 1.0, "tasks": {"caption": 8}}
    pairs["sides"] = {"text – text": 8, "image + text – text": 12, "audio – text": 4}
    captions["sides"] = {"image – text": 8}
    assert (record["train_data"], record["eval_data"]) == ([pairs, captions], [pairs])
    settings = record["settings"]
    assert settings["bf16"] is False and "vision_learning_rate" not in settings
    assert (settings["loss_table"], settings["max_steps"], settings["learning_rate"]) == ("dle", 4, 1e-3)
    assert set(record["versions"]) >= {"torch", "transformers"} and "cpu" in record["hardware"]


def test_a_model_continued_from_another_keeps_its_backbones(world: Path, tmp_path: Path) -> None:
    backbones = ["Qwen/Qwen2-VL-2B-Instruct", "facebook/hubert-base-ls960"]
    for number, flags in enumerate(
        (["--vlm", backbones[0], "--audio", backbones[1]], ["--model", str(tmp_path / "0")])
    ):
        arguments = read_arguments([*flags, "--output_dir", "x", "--use_cpu", "true"])
        write_record(tmp_path / str(number), arguments, None, None)
        record = json.loads((tmp_path / str(number) / "training.json").read_text(encoding="utf-8"))
        assert record["base_models"] == backbones


def test_resuming_ends_where_the_uninterrupted_run_ends(
    world: Path, trained: tuple[Path, list[dict]], tmp_path: Path
) -> None:
    train_run(world, tmp_path, "--resume_from_checkpoint", str(trained[0] / "checkpoint-2"))
    straight, resumed = (load_file(folder / "checkpoint-4" / "model.safetensors") for folder in (trained[0], tmp_path))
    assert straight.keys() == resumed.keys()
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


def test_pairs_without_text_are_trained_and_evaluated(world: Path, tmp_path: Path) -> None:
    rows = [{"images_a": str(world / f"{n}.png"), "audio_b": str(world / f"{n}.wav")} for n in range(4)]
    rows[0]["negatives"] = ["im lặng", {"audio": rows[1]["audio_b"]}]
    (tmp_path / "spoken.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    spoken = {"path": str(tmp_path / "spoken.jsonl"), "task": "image_audio", "media_root": str(world)}
    needs = {"needs_image": True, "needs_audio_b": True}
    tasks = {"image_audio": {"prefix": "<image_audio>", "loss": {"nce": 1.0}, **needs}}
    data = {"train_data": [spoken, {"path": str(world / "pairs.jsonl")}], "eval_data": [spoken], "tasks": tasks}
    temperature = {"text-text": 0.07, "image-text": 0.1, "audio-text": 0.2}
    flags = [part for name, value in data.items() for part in (f"--{name}", json.dumps(value))]
    flags += ["--temperature", json.dumps(temperature), "--learnable_temperature", "true", "--max_steps", "2"]
    log = train_run(world, tmp_path / "run", *flags, "--task_weighting", "none", "--per_device_train_batch_size", "28")
    assert all(entry["loss/image_audio"] > 0 for entry in log if "loss" in entry)
    [found] = [entry for entry in log if "eval_image_audio_recall@1" in entry]
    assert (found["eval_image_audio_candidates"], found["eval_image_audio_chance"]) == (4, 0.25)
    assert found["eval_recall@1"] == found["eval_image_audio_recall@1"]
    assert {name for name in log[0] if name.startswith("temperature/")} == {
        f"temperature/{pair}" for pair in temperature
    }
    record = json.loads((tmp_path / "run" / "training.json").read_text(encoding="utf-8"))
    assert record["train_data"][0]["sides"] == {"image – audio": 4}


def test_rows_that_turn_bad_are_replaced_and_logged_while_texts_are_respelled(world: Path, tmp_path: Path) -> None:
    (tmp_path / "good.png").write_bytes((world / "0.png").read_bytes())
    (tmp_path / "bad.png").write_bytes(b"")
    rows = [{"id": f"r{n}", "a": f"Biển số {n}", "b": f"số {n}", "images": "good.png"} for n in range(7)]
    rows.append({**rows[0], "id": "gone", "images": "bad.png"})
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, [*rows, {**rows[0], "b": ""}])), encoding="utf-8")
    data = {"train_data": [{"path": str(tmp_path / "pairs.jsonl"), "task": "ocr"}], "tasks": {}}
    data["augment_vietnamese"] = {"all": {"Telex": 0.5}}
    flags = [part for name, value in data.items() for part in (f"--{name}", json.dumps(value))]
    flags += ["--check_media", "none", "--on_bad_row", "skip", "--max_steps", "2", "--eval_strategy", "no"]
    flags += ["--per_device_train_batch_size", "8", "--logging_steps", "1", "--load_best_model_at_end", "false"]
    log = train_run(world, tmp_path / "run", *flags, "--max_bad_rows", "0.5", "--task_weighting", "none")
    assert [entry["bad_rows"] for entry in log if "loss" in entry] == [2, 2]
    assert log[0]["bad_rows/unreadable images_a"] == log[0]["bad_rows/invalid b"] == 1
    with pytest.raises(ValueError, match=r"(?s)2 of 9 rows .*`max_bad_rows` is 0.2.*bad.png"):
        train_run(world, tmp_path / "run2", *flags, "--max_bad_rows", "0.2", "--task_weighting", "none")


@pytest.mark.slow
def test_two_ranks_take_the_same_steps_as_one_with_the_joined_batch(world: Path, tmp_path: Path) -> None:
    flags = ["--save_strategy", "no", "--eval_strategy", "no", "--load_best_model_at_end", "false"]
    flags += ["--max_steps", "3", "--prefix_dropout", "0", "--max_grad_norm", "0", "--optim", "sgd"]
    train_run(world, tmp_path / "one", *flags)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, ROOT / "train_vipolyqwen.py", world / "recipe.yaml", "--output_dir", tmp_path / "two"]
    command += [*flags, "--per_device_train_batch_size", "4", "--ddp_backend", "gloo"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    base = load_file(world / "base" / "model.safetensors")
    moved = sum((one[name] - base[name]).square().sum() for name in base if base[name].shape == one[name].shape)
    apart = sum((one[name] - two[name]).square().sum() for name in one)
    assert moved > 0
    assert apart.sqrt() <= 1e-4 * moved.sqrt()


def test_batches_of_similar_length_give_the_vectors_of_one_batch(world: Path, tmp_path: Path) -> None:
    model, processor = build_tiny_base(TEXTS * 4, hidden_size=64, layers=1, vision_size=32, audio_size=32)
    tasks = declare_tasks(None)
    pairs = load_pairs([{"path": str(world / "pairs.jsonl")}], tasks, processor.min_audio_samples)
    collator = MixedBatchCollator(processor, tasks)
    flags = ["--model", "x", "--output_dir", str(tmp_path), "--use_cpu", "true", "--report_to", "none"]
    _, _, loss_arguments, arguments = read_arguments(flags)
    loss = build_loss(loss_arguments, {}, list(tasks))
    trainer = ViPolyQwenTrainer(model, arguments, processor, loss, pairs, None, collator, collator)
    batch = collator([pairs[number] for number in range(len(pairs))])
    with torch.no_grad():
        model.eval()
        together = model(**take_rows(batch, torch.arange(2 * len(pairs)))).embeddings
        assert (trainer.embed(model, batch) - together).abs().max() <= 1e-5


def test_each_part_of_the_model_has_its_learning_rate(world: Path, tmp_path: Path) -> None:
    flags = ["--vision_learning_rate", "2e-6", "--audio_learning_rate", "3e-6", "--head_learning_rate", "5e-4"]
    model_args, _, loss_args, args = read_arguments(
        ["--model", "x", "--output_dir", str(tmp_path), "--use_cpu", "true", "--learning_rate", "1e-5", *flags]
    )
    model, processor = build_tiny_base(TEXTS * 4, hidden_size=64, layers=1, vision_size=32, audio_size=32)
    tasks = declare_tasks(None)
    collator = MixedBatchCollator(processor, tasks)
    loss = build_loss(loss_args, {}, list(tasks))
    optimizer = ViPolyQwenTrainer(model, args, processor, loss, None, None, collator, collator).create_optimizer()
    rate_of = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    named = dict(model.named_parameters())
    assert rate_of[id(named["vlm.visual.patch_embed.proj.weight"])] == 2e-6
    assert rate_of[id(named["vlm.language_model.norm.weight"])] == 1e-5
    assert rate_of[id(named["audio_tower.feature_projection.projection.weight"])] == 3e-6
    assert rate_of[id(named["pooling.query"])] == rate_of[id(named["audio_projection.dense.weight"])] == 5e-4
    assert len(rate_of) == sum(parameter.requires_grad for parameter in model.parameters())


def test_a_flag_overrides_the_recipe(world: Path) -> None:
    arguments = read_arguments([str(world / "recipe.yaml"), "--output_dir", "x", "--temperature", "0.2"])
    assert arguments[2].temperature == 0.2
    assert arguments[2].loss_table == "dle"


def test_an_unknown_recipe_key_is_named_with_the_nearest_known_one(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("lerning_rate: 1.0\n")
    with pytest.raises(ValueError, match=r"recipe.yaml.*'lerning_rate'.*1\.0.*'learning_rate'"):
        read_recipe(path)


def test_declared_tasks_may_have_their_old_name_but_not_both(tmp_path: Path) -> None:
    declared = {"caption": {"prefix": "<caption>"}}
    old, both = tmp_path / "old.yaml", tmp_path / "both.yaml"
    old.write_text(json.dumps({"vlm": "x", "data_types": declared}))
    both.write_text(json.dumps({"tasks": {}, "data_types": declared}))
    rest = ["--output_dir", "x", "--use_cpu", "true"]
    assert read_arguments([str(old), *rest])[1].tasks == declared
    assert read_arguments([str(old), "--tasks", "{}", *rest])[1].tasks == {}
    assert read_arguments(["--vlm", "x", "--data_types", json.dumps(declared), *rest])[1].tasks == declared
    with pytest.raises(ValueError, match="both.yaml: `data_types` .* `tasks` .*keep `tasks`"):
        read_recipe(both)
    with pytest.raises(ValueError, match="flags: `data_types` .* `tasks` .*keep `tasks`"):
        read_arguments(["--vlm", "x", "--data_types", "{}", "--tasks", "{}", *rest])


@pytest.mark.parametrize("name", ["stw", "bimodal", "trimodal", "demo", "real_pairs"])
def test_a_recipe_is_valid(name: str) -> None:  # tests/training/test_recipes.py holds the published values
    _, data_args, loss_args, _ = read_arguments([str(ROOT / f"recipes/{name}.yaml"), "--use_cpu", "true"])
    build_loss(loss_args, data_args.tasks, list(build_tasks(data_args)))


@pytest.mark.parametrize("path", sorted((ROOT / "recipes/ablations").glob("*.yaml")), ids=lambda path: path.stem)
def test_an_ablation_changes_only_its_keys_of_any_recipe(path: Path) -> None:
    changed = read_recipe(path)
    for name in ("trimodal", "demo"):
        command = [str(ROOT / f"recipes/{name}.yaml"), str(path), "--use_cpu", "true"]
        plain, ablated = read_arguments(command[:1] + command[2:]), read_arguments(command)
        build_loss(ablated[2], ablated[1].tasks, list(declare_tasks(ablated[1].tasks)))
        differing = {
            key
            for one, other in zip(plain, ablated, strict=True)
            for key, value in vars(other).items()
            if value != vars(one)[key] and key not in ("logging_dir", "distributed_state")
        }
        assert differing <= set(changed)
        assert all(any(vars(part).get(key) == value for part in ablated) for key, value in changed.items())


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, False),
        ({"WORLD_SIZE": "1"}, False),
        ({"WORLD_SIZE": "2"}, True),  # torchrun: two runs that know nothing of each other, unless told
        ({"WORLD_SIZE": "2", "ACCELERATE_USE_FSDP": "true"}, False),
        ({"WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "True"}, False),
    ],
)
def test_ranks_that_torchrun_starts_without_accelerator_join_on_the_cpu(
    environment: dict[str, str], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WORLD_SIZE", "ACCELERATE_USE_CPU", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    assert launched_on_cpu() is expected


def test_a_task_without_prefix_never_gets_one(world: Path) -> None:
    _, processor = build_tiny_base(TEXTS * 4, hidden_size=64, layers=1, vision_size=32, audio_size=32)
    tasks = declare_tasks(None)
    pairs = load_pairs([{"path": str(world / "pairs.jsonl")}], tasks, processor.min_audio_samples)
    ids = {name: processor.tokenizer.convert_tokens_to_ids(task.prefix) for name, task in tasks.items()}
    rest = ["--vlm", "x", "--output_dir", "x", "--use_cpu", "true"]

    def chosen(*flags: str) -> dict[str, Task]:
        return build_tasks(read_arguments([*rest, *flags])[1])

    without = chosen("--tasks_without_prefix", "ocr")
    collator = MixedBatchCollator(processor, without, prefix_dropout=0.0)
    used = set(collator([pairs[number] for number in range(len(pairs))])["input_ids"].flatten().tolist())
    assert ids["ocr"] not in used and ids["instr"] in used and ids["vqa_multi"] in used
    assert {task.prefix_sides for task in chosen("--prefix_dropout", "1").values()} == {"none"}  # also in evaluation
    with pytest.raises(ValueError, match="unknown task 'orc'; known: text_pair"):
        chosen("--tasks_without_prefix", "orc")


def test_an_unknown_side_of_the_prefix_names_the_recipe_the_value_and_the_choices(tmp_path: Path) -> None:
    recipe = tmp_path / "sides.yaml"
    recipe.write_text("vlm: x\nprefix_sides: b\n")
    with pytest.raises(ValueError, match="sides.yaml: prefix_sides is 'b'; choose one of a, both, none, task"):
        read_recipe(recipe)
    recipe.write_text("vlm: x\ntasks: {page: {prefix: <page>, prefix_sides: left, loss: {nce: 1}}}\n")
    with pytest.raises(ValueError, match="sides.yaml: tasks.page.prefix_sides is 'left'; write one of a, both, none"):
        read_recipe(recipe)


def test_a_wrong_row_stops_the_run_before_any_step(world: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"data_type": "text_pair", "a": "x", "b": "y", "score": 1.5}\n')
    sources = json.dumps([{"path": str(tmp_path / "bad.jsonl")}])
    with pytest.raises(ValueError, match=r"bad\.jsonl.*1\.5"):
        train_run(world, tmp_path / "out", "--train_data", sources)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").glob("checkpoint-*"))


def test_a_declared_task_needs_a_loss(world: Path) -> None:
    loss_args = read_arguments([str(world / "recipe.yaml"), "--output_dir", "x"])[2]
    with pytest.raises(ValueError, match=r"tasks\.caption has no `loss`"):
        build_loss(loss_args, {"caption": {"prefix": "<caption>"}}, ["caption"])

"""LoRA, DoRA and QLoRA: trained parameters, checkpoints, the merged model, publishing."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from helpers import (
    EVERYTHING,
    PLAIN,
    TEXTS,
    assert_same_gradients,
    build_trainer,
    gradients_of,
    speech_config,
    train_run,
    training_step,
)
from killing import same_weights
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer, HubertModel, Qwen2VLImageProcessorPil, Qwen2VLModel, Wav2Vec2FeatureExtractor

from vipolyqwen.data.schema import declare_tasks
from vipolyqwen.demo.tiny_base import tiny_audio_config, tiny_vlm_config, train_tokenizer
from vipolyqwen.modeling_vipolyqwen import ViPolyQwenModel
from vipolyqwen.processing_vipolyqwen import TASK_PREFIXES, ViPolyQwenProcessor
from vipolyqwen.publish_vipolyqwen import build_repository
from vipolyqwen.publishing.checks import check_files
from vipolyqwen.publishing.repository import PublishError, load_adapter, save_adapter
from vipolyqwen.training import adapters
from vipolyqwen.training.adapters import (
    ADAPTER,
    BASE,
    check_installed,
    find_targets,
    new_modules,
    untrained_towers,
)
from vipolyqwen.training.arguments import ModelArguments, read_arguments
from vipolyqwen.training.build import load_model
from vipolyqwen.training.parts import NEW_PARTS, TOWERS, plain_name

peft = pytest.importorskip("peft")

ROOT = Path(__file__).parents[2]
EVERYWHERE = ["--lora_rank", "4", "--lora_targets", "language,vision,audio"]
SOUND = torch.randn(1, 4000, generator=torch.Generator().manual_seed(0))
PREFIX_ROWS = "vlm.language_model.embed_tokens.token_adapter.trainable_tokens_delta.default"


@torch.no_grad()
def vectors_of(model: torch.nn.Module) -> Tensor:
    """Unit vectors of a text with the prefix of a task, an image and a sound."""
    model.eval()
    config = model.config
    torch.manual_seed(0)
    image = {"pixel_values": torch.randn(4, 1176), "image_grid_thw": torch.tensor([[1, 2, 2]])}
    text = [[config.text_config.vocab_size - 1, 400, 5, 6], [config.image_token_id, 5, 6, 7]]
    vectors = model(input_ids=torch.tensor(text), **image).embeddings
    return torch.cat([vectors, model(audio_features=SOUND).embeddings])


def adapted(base: Path, adapter: Path) -> torch.nn.Module:
    """The adapter on its base, not merged."""
    return peft.PeftModel.from_pretrained(ViPolyQwenModel.from_pretrained(base), adapter)


def model_of(world: Path, *flags: str) -> tuple[torch.nn.Module, ViPolyQwenProcessor]:
    """The model and processor of a run with these flags."""
    given = [str(world / "recipe.yaml"), "--output_dir", str(world / "unused"), *flags]
    model_args, data_args, _, args = read_arguments(given)
    return load_model(model_args, args, declare_tasks(data_args.tasks))


# Trained parameters


@pytest.mark.parametrize("dora", [False, True])
def test_adapters_new_parts_and_prefixes_are_trained_and_nothing_else(world: Path, corpus: Path, dora: bool) -> None:
    flags = [*EVERYWHERE, "--head_learning_rate", "5e-4", "--vision_learning_rate", "2e-6", "--use_dora", str(dora)]
    model, processor = model_of(world, *flags)
    base = load_file(world / BASE / "model.safetensors")
    layers = [name for name in base if _is_adapted_weight(name)]
    sizes = [base[name].shape for name in layers]
    assert len(layers) == 7 + 4 + 6  # of one layer of each tower
    expected = sum(4 * (rows + columns) + (rows if dora else 0) for rows, columns in sizes)
    expected += sum(base[name].numel() for name in base if name.split(".")[0] in NEW_PARTS)
    expected += len(processor.task_prefixes) * model.config.text_config.hidden_size
    assert sum(value.numel() for value in model.parameters() if value.requires_grad) == expected

    trainer, pairs = build_trainer(corpus, *flags, model=model)
    optimizer = trainer.create_optimizer()
    training_step(trainer, list(pairs))
    rates = {id(value): group["lr"] for group in optimizer.param_groups for value in group["params"]}
    for name, value in model.named_parameters():
        assert (value.grad is not None) == value.requires_grad == (id(value) in rates), name
        if value.requires_grad:
            is_head = plain_name(name).split(".")[0] in NEW_PARTS
            assert rates[id(value)] == (5e-4 if is_head else 2e-6 if ".visual." in name else 5e-5), name
    optimizer.step()
    optimizer.step()  # LoRA's A moves once B has left 0
    kept = {
        plain_name(name)
        .replace(".base_layer", "")
        .replace(".token_adapter", "")
        .replace(".original_module", ""): value
        for name, value in model.named_parameters()
        if not value.requires_grad
    }
    assert kept.keys() == base.keys()
    assert all(torch.equal(value, base[name]) for name, value in kept.items())


def _is_adapted_weight(name: str) -> bool:
    ends = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # language, speech
    ends += ("attn.qkv", "attn.proj", "fc1", "fc2", "out_proj", "intermediate_dense", "output_dense")
    return name.removesuffix(".weight").endswith(ends) and name.endswith(".weight")


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("flags", "with_graph"),
    [
        (["--freeze", "vision"], ["language"]),
        (["--lora_targets", "vision,language"], ["vision", "language"]),
        (["--lora_targets", "audio", "--freeze", "language"], ["audio"]),
        (["--lora_targets", "vision", "--freeze", "language,audio"], ["vision", "language"]),
    ],
)
def test_a_tower_without_trained_parameters_builds_no_graph(
    world: Path, flags: list[str], with_graph: list[str], checkpointing: bool
) -> None:
    model, _ = model_of(world, "--lora_rank", "2", *flags)
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    builds = {}
    for name, path in TOWERS.items():
        model.get_base_model().get_submodule(path).register_forward_hook(
            lambda module, inputs, output, name=name: builds.update({name: output[0].requires_grad})
        )
    prefix = model.config.text_config.vocab_size - 64  # the first one
    vectors = model(
        input_ids=torch.tensor([[prefix, model.config.image_token_id, 5, 6]]),
        pixel_values=torch.randn(4, 1176),
        image_grid_thw=torch.tensor([[1, 2, 2]]),
        audio_features=SOUND,
    ).embeddings
    assert [name for name, builds_graph in builds.items() if builds_graph] == sorted(
        with_graph, key=list(builds).index
    )
    vectors[:, 0].sum().backward()
    trained = {plain_name(name) for name, value in model.named_parameters() if value.requires_grad}
    assert (PREFIX_ROWS in trained) == (not flags[-1].startswith("language") or "--freeze" not in flags)
    for name, value in model.named_parameters():
        assert (value.grad is not None) == value.requires_grad, name


def test_micro_batches_and_gradient_checkpointing_give_the_gradients_of_the_full_batch(
    world: Path, corpus: Path
) -> None:
    def run(*flags: str) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model, _ = model_of(world, *EVERYWHERE)
        with torch.no_grad():
            for name, value in model.named_parameters():
                if "lora_B" in name:  # 0 at first, and with it the gradient of A
                    value.normal_(std=0.05)
        trainer, pairs = build_trainer(corpus, *EVERYTHING, *flags, model=model)
        if trainer.args.gradient_checkpointing:
            model.gradient_checkpointing_enable()
        training_step(trainer, list(pairs))
        return gradients_of(trainer)

    plain = run()
    key_bias = [name for name in plain if "k_proj.lora" in name]
    assert key_bias
    assert_same_gradients(run("--embed_chunk", "3"), plain)
    assert_same_gradients(run("--gradient_checkpointing", "true"), plain)


@pytest.mark.parametrize(
    ("target", "frozen", "message"),
    [
        ("q_porj", [], "names 'q_porj'.* Did you mean 'q_proj'"),
        ("dense", [], "names 'dense'"),  # in a projection, which is trained in full
        ("mlp", [], "names 'mlp'"),  # a container of layers
        ("qkv", ["vision"], r"names 'qkv'.*towers \(language, audio\) or layers \(down_proj, "),
    ],
)
def test_a_target_that_is_no_layer_of_a_trained_tower_is_named(
    world: Path, target: str, frozen: list[str], message: str
) -> None:
    model = ViPolyQwenModel.from_pretrained(world / "base")
    with pytest.raises(ValueError, match=f"`lora_targets` {message}"):
        find_targets(model, ["language", target], frozen)


def test_layers_can_be_targets_by_name_in_the_towers_that_are_not_frozen(world: Path) -> None:
    model = ViPolyQwenModel.from_pretrained(world / "base")
    [found] = find_targets(model, ["v_proj"], []).values()
    parents = ["audio_tower.encoder.layers.0.attention", "vlm.language_model.layers.0.self_attn"]
    assert sorted(found) == [f"{parent}.v_proj" for parent in parents]
    [found] = find_targets(model, ["v_proj"], ["audio"]).values()
    assert found == ["vlm.language_model.layers.0.self_attn.v_proj"]


def test_an_adapter_that_the_attention_of_wavlm_would_bypass_is_refused(world: Path) -> None:
    config = ViPolyQwenModel.config_class.from_pretrained(world / "base")
    config.audio_config = speech_config("wavlm")
    model = ViPolyQwenModel(config)
    with pytest.raises(ValueError, match=r"'q_proj'.* audio_tower\..*WavLM"):
        find_targets(model, ["q_proj"], [])
    [found] = find_targets(model, ["audio"], []).values()
    assert {name.split(".")[-2] for name in found} == {"feed_forward"}


def test_no_speech_encoder_gets_no_adapter(world: Path) -> None:
    config = ViPolyQwenModel.config_class.from_pretrained(world / "base")
    config.audio_config = None
    model = ViPolyQwenModel(config)
    with pytest.raises(ValueError, match=r"names 'audio'.*towers \(vision, language\) or layers"):
        find_targets(model, ["audio"], [])
    assert untrained_towers(model, ModelArguments(model="x", lora_rank=1)) == ["vision"]
    assert new_modules(model) == ["pooling", "projection.dense", "projection.norm"]


def test_adapters_that_could_not_learn_and_options_without_adapter_are_refused() -> None:
    with pytest.raises(ValueError, match="`freeze` and `lora_targets` .*'audio'"):
        ModelArguments(model="x", lora_rank=4, lora_targets="language,audio", freeze="audio")
    with pytest.raises(ValueError, match="`freeze` and `lora_targets` .*'language'"):
        ModelArguments(model="x", lora_rank=4, freeze="language")
    with pytest.raises(ValueError, match="`use_dora` is True.*`lora_rank`"):
        ModelArguments(model="x", use_dora=True)
    with pytest.raises(ValueError, match="`lora_rank` is 0; .*>= 1"):
        ModelArguments(model="x", lora_rank=0)
    with pytest.raises(ValueError, match=r"`lora_dropout` is 1\.5; it must lie in"):
        ModelArguments(model="x", lora_rank=2, lora_dropout=1.5)


def test_a_missing_package_or_device_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    four_bits = ModelArguments(model="x", lora_rank=4, load_in_4bit=True)
    with pytest.raises(ValueError, match="`load_in_4bit` needs .*CUDA.* cpu"):
        check_installed(four_bits, torch.device("cpu"))
    monkeypatch.setattr(adapters, "is_bitsandbytes_available", lambda: False)
    with pytest.raises(ImportError, match="needs bitsandbytes.*pip install -U bitsandbytes"):
        check_installed(four_bits, torch.device("cuda"))
    monkeypatch.setattr(adapters, "is_peft_available", lambda: False)
    with pytest.raises(ImportError, match="`lora_rank` is 4, and adapters need peft.*pip install peft"):
        check_installed(ModelArguments(model="x", lora_rank=4), torch.device("cpu"))


# Runs

RUN = [*EVERYWHERE, "--lora_dropout", "0.1"]


@pytest.fixture(scope="module")
def run(world: Path) -> tuple[Path, list[dict]]:
    """A run of the recipe that trains an adapter, and its log."""
    return world / "adapted", train_run(world, world / "adapted", *RUN)


def test_a_checkpoint_holds_the_adapter_and_the_output_folder_the_merged_model(
    world: Path, run: tuple[Path, list[dict]]
) -> None:
    folder, log = run
    assert not (folder / "checkpoint-4" / "model.safetensors").exists() and not (folder / BASE).exists()
    for adapter in (folder / "checkpoint-4", folder / ADAPTER):
        config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
        assert config["base_model_name_or_path"] == str(world / "base")
        assert not (adapter / "README.md").exists()
    state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    best = Path(state["best_model_checkpoint"])
    stored = load_file(best / "adapter_model.safetensors")
    merged = load_file(folder / "model.safetensors")
    assert torch.equal(stored["base_model.model.pooling.query"], merged["pooling.query"])
    assert (
        vectors_of(ViPolyQwenModel.from_pretrained(folder)) - vectors_of(adapted(world / "base", best))
    ).abs().max() <= 1e-5
    last = [entry for entry in log if "loss" in entry][-1]
    assert all(last[f"drift/{part}"] > 1e-4 for part in NEW_PARTS if part != "audio_fusion")
    settings = json.loads((folder / "training.json").read_text(encoding="utf-8"))["settings"]
    assert (settings["lora_rank"], settings["lora_targets"]) == (4, ["language", "vision", "audio"])


def test_only_adapted_layers_new_parts_and_prefix_rows_differ_in_the_merged_model(
    world: Path, run: tuple[Path, list[dict]]
) -> None:
    before, after = (load_file(folder / "model.safetensors") for folder in (world / "base", run[0]))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    embedding = "vlm.language_model.embed_tokens.weight"
    heads = {name for name in before if name.split(".")[0] in NEW_PARTS}
    assert moved == {embedding, *heads, *filter(_is_adapted_weight, before)}
    processor = ViPolyQwenProcessor.from_pretrained(run[0])
    rows = (before[embedding] != after[embedding]).any(dim=1).nonzero().flatten().tolist()
    seen = {*TASK_PREFIXES.values(), "<caption>"} - {"<audio>"}  # a sound without text has no tokens
    assert rows == sorted(processor.tokenizer.convert_tokens_to_ids(list(seen)))


@pytest.mark.parametrize("flags", [[], ["--use_dora", "true"]], ids=["lora", "dora"])
def test_a_resumed_run_ends_with_the_same_adapter_and_model(
    world: Path, run: tuple[Path, list[dict]], tmp_path: Path, flags: list[str]
) -> None:
    straight, first, last = run[0], "checkpoint-2", "checkpoint-4"
    if flags:
        flags = [*flags, *PLAIN, "--max_steps", "2", "--save_steps", "1"]
        straight, first, last = tmp_path / "straight", "checkpoint-1", "checkpoint-2"
        train_run(world, straight, *RUN, *flags)
    train_run(world, tmp_path / "resumed", *RUN, *flags, "--resume_from_checkpoint", str(straight / first))
    weights = [load_file(folder / last / "adapter_model.safetensors") for folder in (straight, tmp_path / "resumed")]
    assert any("lora_magnitude_vector" in name for name in weights[0]) == bool(flags)
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert same_weights(straight, tmp_path / "resumed")
    merged = ViPolyQwenModel.from_pretrained(straight)
    assert (vectors_of(merged) - vectors_of(adapted(world / "base", straight / ADAPTER))).abs().max() <= 1e-5


def test_a_checkpoint_of_another_adapter_or_of_none_is_refused(
    world: Path, run: tuple[Path, list[dict]], tmp_path: Path
) -> None:
    resume = ["--resume_from_checkpoint", str(run[0] / "checkpoint-2")]
    with pytest.raises(ValueError, match="checkpoint-2 has lora_alpha 8, .* 5"):
        train_run(world, tmp_path, *RUN, *resume, "--lora_alpha", "5")
    with pytest.raises(ValueError, match="checkpoint-2 holds an adapter, .*full model.*`lora_rank`"):
        train_run(world, tmp_path, *resume)
    with pytest.raises(ValueError, match="`model` is .*, an adapter.*`resume_from_checkpoint`"):
        train_run(world, tmp_path, "--model", str(run[0] / "checkpoint-2"))


@pytest.mark.parametrize("name", ["", "checkpoint-2", ADAPTER])
def test_publishing_merges_every_adapter_of_a_run(
    world: Path, run: tuple[Path, list[dict]], tmp_path: Path, name: str
) -> None:
    build_repository(run[0] / name, tmp_path / "out", "someone/x")
    check_files(tmp_path / "out")  # no path of this machine among others
    adapter = run[0] / (name or ADAPTER)
    published = vectors_of(ViPolyQwenModel.from_pretrained(tmp_path / "out"))
    assert (published - vectors_of(adapted(world / "base", adapter))).abs().max() <= 1e-5
    assert (published - vectors_of(ViPolyQwenModel.from_pretrained(world / "base"))).abs().max() > 1e-3
    assert "lora_rank" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


def test_trained_parameters_are_float32_on_a_base_in_half_precision(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "base", tmp_path / "base")
    ViPolyQwenModel.from_pretrained(world / "base", dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    flags = [*EVERYWHERE, "--model", str(tmp_path / "base"), "--bf16", "true"]
    model, processor = model_of(world, *flags)
    assert {value.dtype for value in model.parameters() if value.requires_grad} == {torch.float32}
    assert {value.dtype for value in model.parameters() if not value.requires_grad} == {torch.bfloat16}
    prefix = processor.tokenizer.convert_tokens_to_ids("<ocr>")
    with torch.autocast("cpu", torch.bfloat16):
        vectors = model(input_ids=torch.tensor([[prefix, 5, 6]])).embeddings
        vectors[:, 0].sum().backward()
    assert model.get_base_model().pooling.modules_to_save["default"].query.grad.norm() > 0
    save_adapter(model, processor, tmp_path / "adapter")
    merged, _ = load_adapter(tmp_path / "adapter")
    assert merged.dtype == torch.bfloat16
    assert (merged(input_ids=torch.tensor([[prefix, 5, 6]])).embeddings - vectors).abs().max() < 2e-2


# A base built from backbones


@pytest.fixture(scope="module")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags that name two checkpoints; the embedding of the first has no spare rows."""
    folder = tmp_path_factory.mktemp("backbones")
    torch.manual_seed(0)
    tokenizer = train_tokenizer(TEXTS * 4, 400)
    tokenizer.save_pretrained(folder / "vlm")
    Qwen2VLImageProcessorPil(min_pixels=56**2, max_pixels=56**2).save_pretrained(folder / "vlm")
    config = tiny_vlm_config(tokenizer, 64, 1, 32)
    config.text_config.vocab_size = len(tokenizer)
    Qwen2VLModel(config).save_pretrained(folder / "vlm")
    HubertModel(tiny_audio_config(32, 1)).save_pretrained(folder / "audio")
    Wav2Vec2FeatureExtractor(return_attention_mask=True).save_pretrained(folder / "audio")
    return ["--vlm", str(folder / "vlm"), "--audio", str(folder / "audio"), "--lora_rank", "4"]


@pytest.fixture
def recipe_without_model(world: Path, tmp_path: Path) -> Path:
    """The world's recipe, which leaves the choice of the model to flags."""
    recipe = yaml.safe_load((world / "recipe.yaml").read_text(encoding="utf-8"))
    del recipe["model"]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return tmp_path


def test_backbones_are_written_as_the_base_that_resuming_and_publishing_read(
    backbones: list[str], recipe_without_model: Path, tmp_path: Path
) -> None:
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    train_run(recipe_without_model, straight, *backbones)
    base, merged = (
        load_file(folder / "model.safetensors")["vlm.language_model.embed_tokens.weight"]
        for folder in (straight / BASE, straight)
    )
    old = len(AutoTokenizer.from_pretrained(backbones[1]))
    assert base.shape == merged.shape == (old + 7, 64)
    assert torch.equal(base[:old], merged[:old]) and (base[old:] != merged[old:]).any(dim=1).sum() == 6  # not <audio>

    shutil.copytree(straight, resumed)
    shutil.rmtree(resumed / "checkpoint-4")
    (resumed / "model.safetensors").unlink()
    shutil.move(straight, tmp_path / "moved")  # the adapter named its base by the place it had
    other_seed = [
        "--seed",
        "7",
        "--data_seed",
        "42",
    ]  # would give other new parts and rows if they were initialised again
    train_run(recipe_without_model, resumed, *backbones, *other_seed, "--resume_from_checkpoint", "true")
    config = json.loads((resumed / ADAPTER / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == str(resumed / BASE)
    assert torch.equal(base, load_file(resumed / BASE / "model.safetensors")["vlm.language_model.embed_tokens.weight"])

    build_repository(tmp_path / "moved" / "checkpoint-4", tmp_path / "out", "someone/x")
    published = vectors_of(ViPolyQwenModel.from_pretrained(tmp_path / "out"))
    unmerged = adapted(tmp_path / "moved" / BASE, tmp_path / "moved" / "checkpoint-4")
    assert (published - vectors_of(unmerged)).abs().max() <= 1e-5
    shutil.rmtree(tmp_path / "moved" / BASE)
    with pytest.raises(PublishError, match=r"The base of .*checkpoint-4 was .*straight/base.*base_model_name_or_path"):
        build_repository(tmp_path / "moved" / "checkpoint-4", tmp_path / "again", "someone/x")


@pytest.mark.parametrize("name", ["bimodal", "trimodal", "stw"])
def test_the_lora_recipe_combines_with_any_other(name: str) -> None:
    command = [str(ROOT / f"recipes/{name}.yaml"), str(ROOT / "recipes/lora.yaml"), "--use_cpu", "true"]
    model_args, _, _, args = read_arguments(command)
    assert (model_args.lora_rank, model_args.lora_alpha, model_args.lora_targets) == (16, 32, ["language"])
    assert args.learning_rate == 2e-4 and model_args.vlm == "Qwen/Qwen2-VL-2B-Instruct"

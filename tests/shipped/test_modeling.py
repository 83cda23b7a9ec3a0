"""The model: a row's vector depends on that row alone, and every switch of the configuration does what it says."""

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import build_tiny_model, random_audio, random_image, speech_config
from safetensors.torch import load_file, save_file
from torch import Tensor

from vipolyqwen.configuration_vipolyqwen import POOLINGS, PROJECTIONS, ViPolyQwenConfig
from vipolyqwen.demo.tiny_base import tiny_vlm_config
from vipolyqwen.modeling_vipolyqwen import ViPolyQwenModel
from vipolyqwen.processing_vipolyqwen import ViPolyQwenProcessor
from vipolyqwen.training.build import build_model

TOLERANCE = 1e-5  # largest absolute difference in float32
Row = dict[str, Any]  # "text", "images", "audio", "task": one input


@pytest.fixture(scope="module")
def model(processor: ViPolyQwenProcessor) -> ViPolyQwenModel:
    return build_tiny_model(processor, speech_config())


def mixed_rows(rng: np.random.Generator) -> list[Row]:
    """One input of every kind, no two of the same length."""
    image = lambda width, height: random_image(rng, width, height)  # noqa: E731
    return [
        {"text": "Huế"},
        {"text": "Trên biển ghi gì? 沙滩上有四个绿色的小方块。 " * 3},
        {"text": "What colour are the stars?", "task": "instr"},
        {"images": [image(60, 48)]},
        {"text": "So sánh hai bức ảnh.", "images": [image(40, 90), image(60, 60)], "task": "vqa_multi"},
        {"audio": random_audio(rng, 0.05)},
        {"audio": random_audio(rng, 0.31)},
        {"text": "tiếng sóng biển", "audio": random_audio(rng, 0.12)},
        {"images": [image(90, 40)], "audio": random_audio(rng, 0.2)},
        {"text": "cả ba", "images": [image(50, 50)], "audio": random_audio(rng, 0.08), "task": "audio"},
    ]


def collate(processor: ViPolyQwenProcessor, rows: list[Row], padding_side: str = "right") -> dict[str, Tensor]:
    def column(name: str) -> list | None:
        return [row.get(name) for row in rows] if any(name in row for row in rows) else None

    return processor(
        text=[row.get("text", "") for row in rows],
        images=column("images"),
        audio=column("audio"),
        task=column("task"),
        padding_side=padding_side,
        return_tensors="pt",
    )


@torch.no_grad()
def embed(model: Any, processor: ViPolyQwenProcessor, rows: list[Row], padding_side: str = "right") -> Tensor:
    return model(**collate(processor, rows, padding_side)).embeddings


# --- a row's vector depends on that row alone -------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "norm"), product(["hubert", "wav2vec2", "wavlm"], ["group", "layer"]))
@pytest.mark.parametrize(("pooling", "projection"), product(POOLINGS, PROJECTIONS))
@pytest.mark.parametrize("fusion", ["mean", "attention"])  # `audio` takes the audio vector alone
def test_a_row_gets_the_same_vector_in_every_batch(
    kind: str, norm: str, pooling: str, projection: str, fusion: str, processor: Any, rng: np.random.Generator
) -> None:
    heads = {"pooling": pooling, "projection": projection, "audio_fusion": fusion}
    model = build_tiny_model(processor, speech_config(kind, norm), **heads)
    rows = mixed_rows(rng)
    alone = torch.cat([embed(model, processor, [row]) for row in rows])
    assert alone.dtype == torch.float32
    torch.testing.assert_close(alone.norm(dim=-1), torch.ones(len(rows)))
    assert (alone @ alone.T - torch.eye(len(rows))).max() < 0.999  # no two inputs are alike
    for side, size in (("right", len(rows)), ("left", len(rows)), ("right", 4), ("left", 3)):
        order = rng.permutation(len(rows))[:size]  # every time other neighbours, in another order
        together = embed(model, processor, [rows[i] for i in order], side)
        assert (together - alone[order]).abs().max() <= TOLERANCE, (side, order)


@pytest.mark.parametrize("seed", range(3))
def test_random_mixed_batches_agree_on_every_row(seed: int, model: Any, processor: Any) -> None:
    rng = np.random.default_rng(seed)
    rows = [*mixed_rows(rng), *mixed_rows(rng)]
    vectors = embed(model, processor, rows)
    for side in ("left", "right", "left"):
        order = rng.integers(0, len(rows), rng.integers(1, len(rows)))  # rows may come twice
        together = embed(model, processor, [rows[i] for i in order], side)
        assert (together - vectors[torch.from_numpy(order)]).abs().max() <= TOLERANCE


def test_longer_padding_than_needed_changes_nothing(model: Any, processor: Any, rng: np.random.Generator) -> None:
    rows = [{"text": "Huế", "audio": random_audio(rng, 0.1)}]
    batch = dict(collate(processor, rows))
    vector = model(**batch).embeddings
    for name in ("audio_features", "audio_attention_mask"):
        batch[name] = torch.nn.functional.pad(batch[name], (0, 4321))
    batch["audio_features"][:, 1600:] = 1e4  # what hides behind the mask does not count
    assert (model(**batch).embeddings - vector).abs().max() <= TOLERANCE


@torch.no_grad()
def test_nothing_is_remembered_between_calls(model: Any, processor: Any, rng: np.random.Generator) -> None:
    text, image = {"text": "Three small blue circles"}, {"images": [random_image(rng, 90, 40)]}
    before = embed(model, processor, [text])
    embed(model, processor, [image, {**image, "text": "?"}])
    assert torch.equal(embed(model, processor, [text]), before)


# --- fusion ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fusion", ["mean", "audio"])  # attention: test_fusion.py
def test_fusion_of_audio_and_text_is_what_the_configuration_says(
    fusion: str, processor: Any, rng: np.random.Generator
) -> None:
    model = build_tiny_model(processor, speech_config(), audio_fusion=fusion)
    clip, other = random_audio(rng, 0.2), random_audio(rng, 0.1)
    rows = [{"text": "biển"}, {"audio": clip}, {"text": "biển", "audio": clip}, {"text": "cỏ", "audio": other}]
    text, audio, both, _ = embed(model, processor, rows)
    expected = {"mean": torch.nn.functional.normalize((text + audio) / 2, dim=-1), "audio": audio}[fusion]
    torch.testing.assert_close(both, expected, atol=TOLERANCE, rtol=0)


# --- what comes in and out ---------------------------------------------------------------------------------------


@torch.no_grad()
def test_pooling_weights_sum_to_one_and_are_zero_on_padding(
    model: Any, processor: Any, rng: np.random.Generator
) -> None:
    rows = mixed_rows(rng)
    for side in ("left", "right"):
        batch = collate(processor, rows, side)
        output = model(**batch, output_pooling_weights=True)
        mask = batch["attention_mask"].bool()
        mask = mask[mask.any(dim=-1)]  # audio alone has no row here
        assert output.pooling_weights.shape == mask.shape
        torch.testing.assert_close(output.pooling_weights.sum(dim=-1), torch.ones(len(mask)))
        assert (output.pooling_weights[~mask] == 0).all()
        assert (output.pooling_weights[mask] > 0).all()

        frames = model.audio_tower._get_feat_extract_output_lengths(batch["audio_attention_mask"].sum(dim=-1))
        heard = torch.arange(int(frames.max())) < frames[:, None]
        assert output.audio_pooling_weights.shape == heard.shape
        torch.testing.assert_close(output.audio_pooling_weights.sum(dim=-1), torch.ones(len(heard)))
        assert (output.audio_pooling_weights[~heard] == 0).all()


@torch.no_grad()
def test_hidden_states_attentions_and_weights_come_only_on_request(processor: Any) -> None:
    model = build_tiny_model(processor, attn="eager")
    batch = collate(processor, [{"text": "Huế"}, {"text": "Hà Nội, Đà Nẵng"}])
    assert list(model(**batch).keys()) == ["embeddings"]
    output = model(**batch, output_hidden_states=True, output_attentions=True)
    rows, tokens = batch["input_ids"].shape
    assert [tuple(state.shape) for state in output.hidden_states] == [(rows, tokens, 64)] * 3
    assert [tuple(weights.shape) for weights in output.attentions] == [(rows, 2, tokens, tokens)] * 2
    assert output.pooling_weights is None
    assert isinstance(model(**batch, return_dict=False), tuple)


@torch.no_grad()
def test_embeddings_of_tokens_can_stand_in_for_their_ids(model: Any, processor: Any, rng: np.random.Generator) -> None:
    for row in ({"text": "Huế"}, {"text": "Huế", "images": [random_image(rng)]}):
        batch = dict(collate(processor, [row, {"text": "Hà Nội, Đà Nẵng"}]))
        expected = model(**batch).embeddings
        ids = batch.pop("input_ids")
        given = model(inputs_embeds=model.get_input_embeddings()(ids), **batch).embeddings
        torch.testing.assert_close(given, expected, atol=TOLERANCE, rtol=0)


def test_the_bimodal_model_has_no_audio_parts_and_refuses_audio(processor: Any, rng: np.random.Generator) -> None:
    model = build_tiny_model(processor)
    assert not [name for name, _ in model.named_parameters() if "audio" in name]
    rows = [{"text": "Huế"}, {"images": [random_image(rng)]}]
    assert embed(model, processor, rows).shape == (2, 1024)
    with pytest.raises(ValueError, match="bimodal"):
        embed(model, processor, [{"audio": random_audio(rng)}])


def test_a_row_with_neither_tokens_nor_audio_is_an_error(model: Any, processor: Any, rng: np.random.Generator) -> None:
    batch = dict(collate(processor, [{"text": "Huế"}, {"text": "Hà Nội"}, {"audio": random_audio(rng)}]))
    batch["attention_mask"][1] = 0
    with pytest.raises(ValueError, match="1 of the 3 rows have neither tokens nor audio"):
        model(**batch)
    with pytest.raises(ValueError, match="nothing to embed"):
        model()


def test_images_that_do_not_match_the_slots_are_an_error(model: Any, processor: Any, rng: np.random.Generator) -> None:
    images = [random_image(rng), random_image(rng, 90, 40)]
    batch = dict(collate(processor, [{"text": "ghi gì?", "images": [image]} for image in images]))
    slots, patches = int((batch["input_ids"] == processor.image_token_id).sum()), len(batch["pixel_values"])
    without = {name: value for name, value in batch.items() if name not in ("pixel_values", "image_grid_thw")}
    with pytest.raises(ValueError, match=f"{slots} image tokens, but the 0 images passed fill 0"):
        model(**without)
    with pytest.raises(ValueError, match="`pixel_values` was passed without `image_grid_thw`"):
        model(**without, pixel_values=batch["pixel_values"])
    with pytest.raises(ValueError, match="`image_grid_thw` was passed without `pixel_values`"):
        model(**without, image_grid_thw=batch["image_grid_thw"])
    with pytest.raises(ValueError, match=f"{patches - 4} patches, but the 2 images .* have {patches}"):
        model(**{**batch, "pixel_values": batch["pixel_values"][:-4]})
    for name in ("input_ids", "attention_mask"):
        batch[name] = batch[name][:1]
    with pytest.raises(ValueError, match=rf"image tokens, but the 2 images passed fill {slots}"):
        model(**batch)


@pytest.mark.parametrize("name", ["pixel_value", "audio_feature", "labels", "use_cache"])
def test_an_argument_without_a_meaning_is_refused(name: str, model: Any, processor: Any) -> None:
    with pytest.raises(ValueError, match=f"takes no argument '{name}'"):
        model(**collate(processor, [{"text": "Huế"}]), **{name: None})


def test_clips_that_do_not_match_the_rows_are_an_error(model: Any, processor: Any, rng: np.random.Generator) -> None:
    batch = dict(collate(processor, [{"text": "Huế"}, {"text": "biển", "audio": random_audio(rng)}]))
    with pytest.raises(ValueError, match="marks 2 rows, but 1 clips"):
        model(**{**batch, "has_audio": torch.tensor([True, True])})
    with pytest.raises(ValueError, match="`has_audio` has 3 entries for a batch of 2 rows"):
        model(**{**batch, "has_audio": torch.tensor([False, True, False])})
    without = {name: batch[name] for name in ("input_ids", "attention_mask", "has_audio")}
    with pytest.raises(ValueError, match="`has_audio` marks 1 rows, but 0 clips"):
        model(**without)
    del batch["has_audio"]
    with pytest.raises(ValueError, match="1 clips for a batch of 2 rows"):
        model(**batch)


@torch.no_grad()
def test_bfloat16_gives_float32_unit_vectors_close_to_the_exact_ones(processor: Any, rng: np.random.Generator) -> None:
    model = build_tiny_model(processor, speech_config())
    rows = mixed_rows(rng)
    exact = embed(model, processor, rows)
    vectors = embed(model.bfloat16(), processor, rows)
    assert vectors.dtype == torch.float32
    torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(len(rows)))
    assert (vectors * exact).sum(dim=-1).min() > 0.98


# --- configuration -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pooling": "max"}, "`pooling` is 'max'; it must be one of attention, mean, last"),
        ({"projection": "none"}, "`projection` is 'none'; it must be one of linear, mlp"),
        ({"audio_fusion": "text"}, "`audio_fusion` is 'text'; it must be one of mean, audio, attention"),
        ({"audio_pooling": "max"}, "`audio_pooling` is 'max'; it must be one of attention, mean, last"),
        ({"audio_projection": "none"}, "`audio_projection` is 'none'; it must be one of linear, mlp"),
        ({"audio_prefix": "on"}, "`audio_prefix` is 'on'; it must be one of none, fuse"),
        ({"pooling": None}, "`pooling` is None"),
        ({"projection_dim": 0}, "`projection_dim` is 0"),
        ({"audio_config": {"hidden_size": 32}}, "`audio_config`.*model_type"),
        ({"audio_config": {"model_type": "no-such-model"}}, "no-such-model"),
    ],
)
def test_a_value_without_a_meaning_is_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ViPolyQwenConfig(**fields)


def test_a_configuration_survives_its_file(model: Any, tmp_path: Path) -> None:
    model.config.save_pretrained(tmp_path)
    loaded = ViPolyQwenConfig.from_pretrained(tmp_path)
    assert type(loaded.audio_config) is type(model.config.audio_config)
    assert loaded.to_dict() == model.config.to_dict() | {"_name_or_path": loaded.to_dict().get("_name_or_path")}
    assert ViPolyQwenConfig(**{**model.config.to_dict(), "audio_config": None}).audio_config is None


def test_speech_encoders_of_pretraining_lose_their_own_randomness(processor: Any) -> None:
    vlm_config = tiny_vlm_config(processor.tokenizer, 64, 2, 32)
    audio_config = speech_config(apply_spec_augment=True, layerdrop=0.5)
    model = build_model(vlm_config, audio_config)
    assert (model.config.audio_config.apply_spec_augment, model.config.audio_config.layerdrop) == (False, 0.0)
    assert (audio_config.apply_spec_augment, audio_config.layerdrop) == (True, 0.5)  # the caller's own is not touched


# --- building, saving, loading -----------------------------------------------------------------------------------


def tiny_config(processor: ViPolyQwenProcessor, **fields: Any) -> ViPolyQwenConfig:
    vlm = tiny_vlm_config(processor.tokenizer, 64, 2, 32).to_dict()
    del vlm["model_type"]
    return ViPolyQwenConfig(**{**vlm, "audio_config": speech_config(), **fields})


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_new_parts_start_as_the_papers_say(projection: str, processor: Any) -> None:
    config = tiny_config(processor, projection=projection)
    config.text_config.hidden_size = 4096  # enough numbers for statistics
    config.text_config.num_hidden_layers = config.vision_config.depth = 0
    config.vision_config.hidden_size = 4096
    torch.manual_seed(0)
    model = ViPolyQwenModel(config)
    assert model.pooling.query.mean().abs() < 0.002
    assert model.pooling.query.std().item() == pytest.approx(0.02, rel=0.05)
    for name, parameter in model.projection.named_parameters():
        if name.startswith("norm"):
            assert (parameter == (1 if name.endswith("weight") else 0)).all()
        elif name.endswith("weight"):
            assert parameter.std().item() == pytest.approx(0.02, rel=0.05)
        else:
            assert (parameter == 0).all()


@torch.no_grad()
def test_each_route_has_its_pooling_and_projection(processor: Any, rng: np.random.Generator) -> None:
    routes = {"audio_pooling": "mean", "audio_projection": "mlp"}
    model = build_tiny_model(processor, speech_config(), **routes)
    heads = {name for name in model.state_dict() if not name.startswith(("vlm.", "audio_tower."))}
    assert heads >= {"pooling.query", "projection.dense.weight", "audio_projection.dense_in.weight"}
    assert not [name for name in heads if name.startswith("audio_pooling")]
    audio = collate(processor, [{"audio": random_audio(rng, 0.3)}])
    output = model(**audio, output_pooling_weights=True)
    weights = output.audio_pooling_weights[0]
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / len(weights)))
    as_text = build_tiny_model(processor, speech_config(), pooling="last", projection="mlp")
    given = build_tiny_model(
        processor, speech_config(), pooling="last", projection="mlp", audio_pooling="last", audio_projection="mlp"
    )
    assert torch.equal(as_text(**audio).embeddings, given(**audio).embeddings)


@pytest.mark.parametrize("fields", [{}, {"projection": "mlp"}, {"audio_pooling": "mean", "audio_fusion": "attention"}])
@pytest.mark.parametrize("kind", ["hubert", "wavlm", None])
def test_a_model_built_on_the_meta_device_has_the_same_parameters(
    fields: dict, kind: str | None, processor: Any
) -> None:
    config = tiny_config(processor, **fields, audio_config=kind and speech_config(kind))

    def describe(model: ViPolyQwenModel) -> dict[str, tuple]:
        return {name: (tuple(p.shape), p.dtype, p.requires_grad) for name, p in model.named_parameters()}

    scratch = ViPolyQwenModel(config)
    with torch.device("meta"):
        meta = ViPolyQwenModel(config)
    real = {name for name, parameter in meta.named_parameters() if not parameter.is_meta}
    assert real <= {"audio_tower.masked_spec_embed"}  # stock code builds this one wherever it is
    assert describe(meta) == describe(scratch)
    backbones = tiny_vlm_config(processor.tokenizer, 64, 2, 32), kind and speech_config(kind)
    assert describe(build_model(*backbones, **fields)) == describe(scratch)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("audio_config", [None, speech_config(), speech_config("wavlm", "layer")])
def test_a_saved_model_loads_bit_for_bit(pooling: str, audio_config: Any, processor: Any, tmp_path: Path) -> None:
    model = build_tiny_model(processor, audio_config, pooling=pooling)
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == model.state_dict().keys()
    loaded, report = ViPolyQwenModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected = {**dict(model.named_buffers()), **model.state_dict()}
    for name, value in {**dict(loaded.named_buffers()), **loaded.state_dict()}.items():
        assert torch.equal(value, expected[name]), name
    row = {"text": "Huế", **({} if audio_config is None else {"audio": random_audio(np.random.default_rng(0), 0.1)})}
    torch.testing.assert_close(embed(loaded, processor, [row]), embed(model, processor, [row]), atol=1e-6, rtol=0)


def test_parts_that_a_checkpoint_lacks_are_initialised_not_left_as_garbage(processor: Any, tmp_path: Path) -> None:
    model = build_tiny_model(processor, speech_config(), projection="mlp")
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    new = ("pooling.", "projection.", "audio_pooling.", "audio_projection.")
    kept = {name: weight for name, weight in weights.items() if not name.startswith(new)}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = ViPolyQwenModel.from_pretrained(tmp_path)
    for name, parameter in loaded.named_parameters():
        if name.startswith(new):
            size = {"query": 0.02, "dense": 0.02}.get(next((key for key in ("query", "dense") if key in name), ""), 1)
            assert parameter.abs().max() <= 6 * size, name
            assert parameter.isfinite().all(), name
    assert loaded.pooling.query.std().item() == pytest.approx(0.02, rel=0.5)


def test_the_embedding_table_can_grow(processor: Any) -> None:
    model = build_tiny_model(processor)
    before = model.get_input_embeddings().weight.detach().clone()
    vector = embed(model, processor, [{"text": "Huế"}])
    model.resize_token_embeddings(len(before) + 8)
    assert len(model.get_input_embeddings().weight) == model.config.text_config.vocab_size == len(before) + 8
    assert torch.equal(model.get_input_embeddings().weight[: len(before)], before)
    assert torch.equal(embed(model, processor, [{"text": "Huế"}]), vector)


# --- training ----------------------------------------------------------------------------------------------------


def gradients(model: ViPolyQwenModel, batch: dict[str, Tensor]) -> dict[str, Tensor | None]:
    torch.manual_seed(1)
    model.zero_grad()
    vectors = model(**batch).embeddings
    (vectors * torch.randn(vectors.shape)).sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize(("kind", "norm"), product(["hubert", "wav2vec2", "wavlm"], ["group", "layer"]))
def test_a_gradient_reaches_every_trainable_parameter(
    kind: str, norm: str, projection: str, processor: Any, rng: np.random.Generator
) -> None:
    model = build_tiny_model(processor, speech_config(kind, norm), projection=projection).train()
    found = gradients(model, collate(processor, mixed_rows(rng)))
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen <= {"audio_tower.masked_spec_embed"}  # only SpecAugment would train it
    for name, gradient in found.items():
        assert gradient is not None, name
        assert gradient.isfinite().all(), name
        if not ("audio_tower" in name and name.endswith("k_proj.bias")):  # it moves every score of a row alike
            assert gradient.abs().max() > 0, name


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        *product(["hubert", "wav2vec2", "wavlm"], [None, {"use_reentrant": False}]),
        *product(["hubert", "wav2vec2"], [{"use_reentrant": True}]),  # stock WavLM recurses for ever with it
    ],
)
def test_gradient_checkpointing_gives_the_same_gradients(
    kind: str, options: dict | None, processor: Any, rng: np.random.Generator
) -> None:
    model = build_tiny_model(processor, speech_config(kind)).train()
    batch = collate(processor, mixed_rows(rng))
    expected = {name: gradient.clone() for name, gradient in gradients(model, batch).items()}
    model.gradient_checkpointing_enable(options)
    towers = (model.vlm.language_model, model.vlm.visual, model.audio_tower.encoder)
    assert all(tower.gradient_checkpointing for tower in towers)
    for name, gradient in gradients(model, batch).items():
        assert gradient is not None, name
        torch.testing.assert_close(gradient, expected[name], msg=name)


# --- attention ---------------------------------------------------------------------------------------------------


def attention_of_every_tower(model: Any) -> set[str]:
    towers = (model, model.vlm, model.vlm.language_model, model.vlm.visual, model.audio_tower)
    return {tower.config._attn_implementation for tower in towers}


@pytest.mark.parametrize("kind", ["hubert", "wav2vec2"])
def test_the_attention_switch_reaches_every_tower_and_changes_no_vector(
    kind: str, processor: Any, rng: np.random.Generator, tmp_path: Path
) -> None:
    build_tiny_model(processor, speech_config(kind)).save_pretrained(tmp_path)
    rows, vectors = mixed_rows(rng), {}
    for attn in ("eager", "sdpa"):
        loaded = ViPolyQwenModel.from_pretrained(tmp_path, attn_implementation=attn).eval()
        assert attention_of_every_tower(loaded) == {attn}
        vectors[attn] = embed(loaded, processor, rows)
        assert attention_of_every_tower(build_tiny_model(processor, speech_config(kind), attn=attn)) == {attn}
    assert (vectors["eager"] - vectors["sdpa"]).abs().max() <= TOLERANCE


def test_the_attention_of_every_tower_can_be_switched_later(processor: Any) -> None:
    model = build_tiny_model(processor, speech_config())
    model.set_attn_implementation("eager")
    assert attention_of_every_tower(model) == {"eager"}

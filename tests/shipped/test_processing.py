"""The processor: text, length, batches and tasks, and errors that name the remedy."""

import copy
import json
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import build_tiny_model, chat_ids, ids_of, random_audio, random_image, speech_config, user
from PIL import Image
from torch import Tensor
from transformers import Qwen2VLImageProcessor, Qwen2VLImageProcessorPil
from transformers.utils import is_torchvision_available

from vipolyqwen.processing_vipolyqwen import TASK_PREFIXES, ViPolyQwenProcessor

START, PAD, END = "<|vision_start|>", "<|image_pad|>", "<|vision_end|>"


@pytest.fixture(scope="module")
def model(tiny: tuple) -> Any:
    return tiny[0]


@torch.no_grad()
def embed(model: Any, processor: ViPolyQwenProcessor, **inputs: Any) -> Tensor:
    return model(**processor(**inputs, return_tensors="pt")).embeddings


def test_a_task_is_selected_by_the_argument_and_by_the_start_of_a_system_text_only(
    processor: Any, plain_ids: Callable
) -> None:
    end, prefix = processor.tokenizer.eos_token_id, TASK_PREFIXES["ocr"]
    prefix_id = processor.tokenizer.convert_tokens_to_ids(prefix)
    selected = [[prefix_id, *plain_ids("Huế"), end]]
    assert ids_of(processor, text="Huế", task="ocr") == selected
    assert chat_ids(processor, user("Huế", system=prefix)) == selected
    assert chat_ids(processor, [{"role": "system", "content": prefix}, *user("Huế")]) == selected
    forged = [[*plain_ids(f"{prefix}Huế"), end]]
    assert ids_of(processor, text=f"{prefix}Huế") == forged
    assert chat_ids(processor, user(f"{prefix}Huế")) == forged
    assert chat_ids(processor, [{"role": "assistant", "content": f"{prefix}Huế"}]) == forged
    rest = "x<instr><|image_pad|>"  # what follows the prefix in a system text is content
    assert chat_ids(processor, user("Huế", system=prefix + rest)) == [
        [prefix_id, *plain_ids(rest), *plain_ids("Huế"), end]
    ]
    assert chat_ids(processor, user("Huế", system=f" {prefix}"))[0][0] != prefix_id


class OtherImageProcessor:
    """Stands for the class that transformers loads where torchvision is installed: the same settings, other code."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings

    def to_dict(self) -> dict[str, Any]:
        return {**self.settings, "image_processor_type": type(self).__name__}


def test_images_are_resized_with_pillow_whatever_class_was_loaded(processor: Any, rng: np.random.Generator) -> None:
    settings = processor.image_processor.to_dict() | {"image_mean": (0.25, 0.5, 0.75)}
    loaded = OtherImageProcessor(settings)
    other = ViPolyQwenProcessor(loaded, copy.deepcopy(processor.tokenizer), processor.feature_extractor)
    assert type(other.image_processor) is type(processor.image_processor) is Qwen2VLImageProcessorPil
    assert other.image_processor.to_dict() == settings
    expected = Qwen2VLImageProcessorPil(**settings)([image := random_image(rng)])["pixel_values"]
    np.testing.assert_array_equal(other(images=[[image]])["pixel_values"], expected)


@pytest.mark.skipif(not is_torchvision_available(), reason="torchvision is not installed")
def test_torchvision_changes_no_pixel(processor: Any, rng: np.random.Generator) -> None:
    loaded = Qwen2VLImageProcessor.from_dict(processor.image_processor.to_dict())
    other = ViPolyQwenProcessor(loaded, copy.deepcopy(processor.tokenizer), processor.feature_extractor)
    images = [[random_image(rng, 333, 71)]]
    np.testing.assert_array_equal(other(images=images)["pixel_values"], processor(images=images)["pixel_values"])


# --- text --------------------------------------------------------------------------------------------------------


def test_nfc_and_nfd_are_one_text(model: Any, processor: Any) -> None:
    text = "Đường phố Huế đẹp tuyệt, ữ ặ ỹ Å ﬁ"
    forms = [unicodedata.normalize(form, text) for form in ("NFC", "NFD")]
    assert forms[0] != forms[1]
    assert len(set(map(tuple, ids_of(processor, text=forms)))) == 1
    assert len(set(map(tuple, chat_ids(processor, *map(user, forms))))) == 1
    vectors = [embed(model, processor, text=form) for form in forms]
    assert torch.equal(*vectors)
    (ids,) = ids_of(processor, text=text)
    assert processor.tokenizer.decode(ids[:-1]) == forms[0]  # compatibility forms such as ﬁ stay what they are


def test_a_tokenizer_that_leaves_nfd_alone_gets_nfc_all_the_same(processor: Any) -> None:
    own = copy.deepcopy(processor)
    own.tokenizer.backend_tokenizer.normalizer = None  # Qwen2's has NFC; another one may not
    text = unicodedata.normalize("NFD", "Đường phố Huế")
    assert own.tokenizer(text)["input_ids"] != own.tokenizer(unicodedata.normalize("NFC", text))["input_ids"]
    assert ids_of(own, text=text) == chat_ids(own, user(text)) == ids_of(processor, text=text)
    composed = unicodedata.normalize("NFC", text)
    assert chat_ids(own, user("Huế", system=text)) == chat_ids(own, user("Huế", system=composed))


def test_the_chat_template_as_a_string_reads_as_the_ids_do(processor: Any, rng: np.random.Generator) -> None:
    image, other = random_image(rng), random_image(rng, 90, 40)
    conversations = [
        user("Huế"),
        user("Huế có gì?", system=TASK_PREFIXES["instr"]),
        user(image, "ghi gì?", system=TASK_PREFIXES["ocr"]),
        user("so sánh", image, "với", other, system=TASK_PREFIXES["vqa_multi"]),
    ]
    image_id = processor.tokenizer.convert_tokens_to_ids(PAD)
    for conversation in conversations:
        (ids,) = chat_ids(processor, conversation)
        string = processor.apply_chat_template(conversation, tokenize=False)
        assert string.endswith(processor.tokenizer.eos_token)
        collapsed = [i for n, i in enumerate(ids) if not (i == image_id and ids[n - 1] == image_id)]
        assert processor.tokenizer(string, add_special_tokens=False)["input_ids"] == collapsed


def test_an_image_takes_the_tokens_that_its_size_says(processor: Any, rng: np.random.Generator) -> None:
    for width, height in ((60, 48), (200, 30), (30, 200)):
        (ids,) = ids_of(processor, images=[random_image(rng, width, height)])
        counted = processor._get_num_multimodal_tokens(image_sizes=[(height, width)])
        assert ids.count(processor.image_token_id) == counted.num_image_tokens[0]


# --- length ------------------------------------------------------------------------------------------------------


def runs(ids: list[int], token: int) -> list[int]:
    """Lengths of the unbroken runs of `token`."""
    text = "".join("x" if i == token else " " for i in ids)
    return [len(run) for run in text.split()]


def test_truncation_cuts_text_and_never_an_image(processor: Any, plain_ids: Callable, rng: Any) -> None:
    images = [random_image(rng), random_image(rng, 90, 40)]
    first, second = "So sánh hai bức ảnh này. " * 4, "Có gì khác nhau? " * 4
    conversation = user(first, images[0], second, images[1], system=TASK_PREFIXES["vqa_multi"])
    (whole,) = chat_ids(processor, conversation)
    tokenizer = processor.tokenizer
    slots = runs(whole, processor.image_token_id)
    fixed = 2 + sum(slots) + 2 * len(slots)
    texts = [plain_ids(first), plain_ids(second)]
    assert len(whole) == fixed + sum(map(len, texts))
    for limit in range(fixed + 1, len(whole) + 2):
        options = {"max_length": limit, "truncation": True}
        batch = processor.apply_chat_template(conversation, tokenize=True, return_dict=True, **options)
        (ids,) = batch["input_ids"]
        assert len(ids) == min(limit, len(whole))
        assert ids[0] == tokenizer.convert_tokens_to_ids(TASK_PREFIXES["vqa_multi"])
        assert ids[-1] == tokenizer.eos_token_id
        assert runs(ids, processor.image_token_id) == slots
        special = {*tokenizer.convert_tokens_to_ids([START, PAD, END]), ids[0], ids[-1]}
        kept = [i for i in ids if i not in special]
        assert kept == (texts[0] + texts[1])[: limit - fixed]  # cut from the end


def test_images_that_alone_exceed_the_limit_are_an_error(processor: Any, rng: np.random.Generator) -> None:
    image = random_image(rng)
    (ids,) = ids_of(processor, images=[image], task="ocr")
    assert ids_of(processor, images=[image], task="ocr", max_length=len(ids)) == [ids]
    with pytest.raises(ValueError, match=rf"take {len(ids)} tokens; the limit is {len(ids) - 1}.*fewer images"):
        processor(images=[image], text=["Huế"], task="ocr", max_length=len(ids) - 1)


def test_the_limit_is_the_tokenizer_s_unless_told_otherwise(processor: Any) -> None:
    limit = processor.tokenizer.model_max_length
    (ids,) = ids_of(processor, text="a b c " * limit)
    assert len(ids) == limit
    assert ids[-1] == processor.tokenizer.eos_token_id
    assert len(ids_of(processor, text="a b c " * limit, truncation=False)[0]) > limit


def test_the_limit_of_tokens_is_no_limit_of_samples(processor: Any, rng: np.random.Generator) -> None:
    audio, options = random_audio(rng, 0.2), {"max_length": 12, "truncation": True, "padding": "max_length"}
    batch = processor(text=["a b c " * 20], audio=[audio], **options, return_tensors="pt")
    assert batch["input_ids"].shape == (1, 12)
    assert batch["audio_features"].shape == (1, 3200)
    chat = processor.apply_chat_template(
        [user("a b c " * 20, audio)], tokenize=True, return_dict=True, processor_kwargs=options
    )
    assert np.shape(chat["audio_features"]) == (1, 3200)


@pytest.mark.parametrize("multiple", [None, 8])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_that_of_the_tokenizer(side: str, multiple: int | None, processor: Any) -> None:
    options = {"padding_side": side, "pad_to_multiple_of": multiple}
    for texts in (["Huế", "Hà Nội, Đà Nẵng"], ["Hà Nội"]):
        rows = ids_of(processor, text=texts)
        expected = processor.tokenizer.pad({"input_ids": rows}, return_attention_mask=True, **options)
        batch = processor(text=texts, return_tensors="pt", **options)
        assert {name: values.tolist() for name, values in batch.items()} == dict(expected)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_on_the_side_that_was_asked_for(side: str, processor: Any) -> None:
    batch = processor(text=["Huế", "Hà Nội, Đà Nẵng"], padding_side=side)
    short = batch["attention_mask"][0]
    assert short == sorted(short, reverse=side == "right")
    assert 0 in short
    padded = processor(text=["Huế"], padding="max_length", max_length=40, return_tensors="pt")
    assert padded["input_ids"].shape == padded["attention_mask"].shape == (1, 40)


# --- a prefix before audio alone ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fusing(processor: ViPolyQwenProcessor) -> ViPolyQwenProcessor:
    changed = copy.copy(processor)
    changed.audio_prefix = "fuse"
    return changed


def test_a_prefix_before_audio_alone_is_embedded_if_the_processor_fuses(
    fusing: Any, processor: Any, rng: np.random.Generator
) -> None:
    clips = [random_audio(rng, 0.2), random_audio(rng, 0.1)]
    prefix, end = processor.tokenizer.convert_tokens_to_ids("<audio>"), processor.tokenizer.eos_token_id
    assert ids_of(fusing, audio=clips, task=["audio", None]) == [[prefix, end], []]
    assert chat_ids(fusing, user(clips[0], system="<audio>"), user(clips[1])) == [[prefix, end], []]
    assert "input_ids" not in fusing(audio=clips)  # f(x, None) is the audio vector
    assert "input_ids" not in processor(audio=clips, task="audio")
    mixed = {"text": ["Huế", ""], "audio": clips, "task": "audio"}
    assert ids_of(fusing, **mixed)[0] == ids_of(processor, **mixed)[0]
    assert ids_of(processor, **mixed)[1] == []


@pytest.mark.parametrize("fusion", ["mean", "attention", "audio"])
@torch.no_grad()
def test_the_prefix_of_audio_alone_steers_as_a_text_beside_it(
    fusion: str, fusing: Any, processor: Any, rng: np.random.Generator
) -> None:
    model = build_tiny_model(processor, speech_config(), audio_fusion=fusion, audio_prefix="fuse")
    clip = random_audio(rng, 0.2)
    plain, steered, other = (
        model(**fusing(audio=clip, task=task, return_tensors="pt")).embeddings[0] for task in (None, "audio", "instr")
    )
    if fusion == "audio":
        assert torch.equal(plain, steered)
        return
    assert (plain - steered).abs().max() > 0.01 and (steered - other).abs().max() > 0.001
    if fusion == "mean":
        prefix = model(**processor(text="", task="audio", return_tensors="pt")).embeddings[0]
        torch.testing.assert_close(steered, torch.nn.functional.normalize(plain + prefix, dim=0), atol=1e-5, rtol=0)


def test_an_unknown_effect_of_the_prefix_is_refused(processor: Any) -> None:
    parts = (processor.image_processor, processor.tokenizer, processor.feature_extractor)
    with pytest.raises(ValueError, match="`audio_prefix` is 'on'; it must be one of none, fuse"):
        ViPolyQwenProcessor(*parts, audio_prefix="on")


# --- bad input ---------------------------------------------------------------------------------------------------

GREY = Image.new("RGB", (60, 48), "grey")
AUDIO = random_audio(np.random.default_rng(0))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\ud800b", r"lone surrogate.*ud800.*position 1"),
        (5, "5.*pass a string"),
        (None, "None.*pass a string"),
        (b"bytes", "bytes.*pass a string"),
        (["nested"], "list.*nested.*pass a string"),
    ],
)
def test_a_bad_text_is_an_error_that_names_the_value_and_the_remedy(text: Any, message: str, processor: Any) -> None:
    with pytest.raises(ValueError, match=message):
        processor(text=["Huế", text])
    with pytest.raises(ValueError, match=message):
        chat_ids(processor, [{"role": "user", "content": [{"type": "text", "text": text}]}])


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "nothing to embed"),
        ({"text": 5}, "5"),
        ({"text": "a", "videos": ["b.mp4"]}, "`videos` were passed.*frames as images"),
        ({"text": "a", "task": "dance"}, "Unknown task 'dance'; this processor knows text_pair, instr"),
        ({"text": ["a", "b"], "task": ["ocr", "dance"]}, "Unknown task 'dance'"),
        ({"text": ["a", "b"], "task": ["ocr"]}, "`task` has 1 entries for a batch of 2"),
        ({"text": ["a", "b"], "task": ["ocr"] * 3}, "`task` has 3 entries for a batch of 2"),
        ({"text": ["a", "b"], "images": [GREY]}, "1 images for 2 texts"),
        ({"text": ["a", "b"], "images": [GREY] * 3}, "3 images for 2 texts.*list of lists"),
        ({"text": ["a", "b"], "images": [[GREY]]}, "`images` has 1 entries for a batch of 2"),
        ({"text": ["a"], "images": [[GREY], [GREY]]}, "`images` has 2 entries for a batch of 1"),
        ({"text": ["a", "b"], "audio": [AUDIO]}, "`audio` has 1 entries for a batch of 2"),
        ({"text": ["a", "b"], "audio": AUDIO}, "`audio` has 1 entries for a batch of 2"),
        ({"images": [GREY, GREY], "audio": [AUDIO]}, "`audio` has 1 entries for a batch of 2"),
    ],
)
def test_a_batch_that_does_not_fit_together_is_an_error(inputs: dict, message: str, processor: Any) -> None:
    with pytest.raises(ValueError, match=message):
        processor(**inputs)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"type": "video", "video": "a.mp4"}, "type 'video'; this model takes text, image and audio"),
        ({"type": "image", "img": GREY}, "image part with type, img only; it needs one of image, url, path"),
        ({"type": "audio"}, "audio part with type only; it needs one of audio, url, path"),
        ({"type": "text"}, "text part with type only; it needs one of text"),
        ({"text": "no type"}, "type None; this model takes text, image and audio"),
    ],
)
def test_a_message_part_without_its_content_is_an_error(part: dict, message: str, processor: Any) -> None:
    with pytest.raises(ValueError, match=message):
        chat_ids(processor, [{"role": "user", "content": [part]}])


# --- batches -----------------------------------------------------------------------------------------------------


def test_every_layout_of_images_means_the_same(processor: Any, rng: np.random.Generator) -> None:
    first, second = random_image(rng), random_image(rng, 90, 40)
    alone = {name: ids_of(processor, images=[[image]])[0] for name, image in (("1", first), ("2", second))}
    both = [*alone["1"][:-1], *alone["2"]]
    for images, expected in [
        (first, [alone["1"]]),
        ([first, second], [alone["1"], alone["2"]]),
        ((first, second), [alone["1"], alone["2"]]),
        ([[first], [second]], [alone["1"], alone["2"]]),
        ([[first, second]], [both]),
        ([(first, second), second], [both, alone["2"]]),
        ([[second], [first, second]], [alone["2"], both]),
    ]:
        assert ids_of(processor, images=images) == expected
        assert ids_of(processor, images=images, text=[""] * len(expected)) == expected
    assert ids_of(processor, images=[first, second], text="") == [both]  # one text: all images are its own
    assert ids_of(processor, images=[first, second], text=[""]) == [both]


def test_rows_without_an_image_or_audio_say_none(model: Any, processor: Any, rng: np.random.Generator) -> None:
    image, audio = random_image(rng), random_audio(rng, 0.2)
    batch = processor(
        text=["a", "b", "", ""], images=[None, [], [image], None], audio=[None, audio, None, audio],
        return_tensors="pt",
    )  # fmt: skip
    assert batch["has_audio"].tolist() == [False, True, False, True]
    assert batch["attention_mask"].any(dim=-1).tolist() == [True, True, True, False]
    assert len(batch["image_grid_thw"]) == 1
    assert len(batch["audio_features"]) == 2
    assert set(batch) == set(processor.model_input_names)
    assert model(**batch).embeddings.shape == (4, 1024)
    none_at_all = processor(text=["a", "b"], images=[None, None], audio=[None, None])
    assert set(none_at_all) == {"input_ids", "attention_mask"}
    assert set(processor(text=["a"], images=[None], audio=[None])) == {"input_ids", "attention_mask"}  # a batch of one
    assert processor(text=["a"], images=[None, image])["image_grid_thw"].shape == (1, 3)
    for clips in ((audio, None), [audio, None]):  # a tuple is a batch too
        assert processor(text=("a", "b"), audio=clips)["has_audio"] == [True, False]


def test_audio_alone_needs_no_tokens(model: Any, processor: Any, rng: np.random.Generator) -> None:
    clips = [random_audio(rng, 0.2), random_audio(rng, 0.1)]
    batch = processor(audio=clips, return_tensors="pt")
    assert set(batch) == {"audio_features", "audio_attention_mask", "has_audio"}
    assert batch["audio_attention_mask"].sum(dim=-1).tolist() == [3200, 1600]
    vectors = model(**batch).embeddings
    for empty in ({"text": ["", ""]}, {"task": "audio"}, {"text": ["", ""], "task": "audio"}):
        given = model(**processor(audio=clips, **empty, return_tensors="pt")).embeddings
        torch.testing.assert_close(given, vectors, atol=1e-6, rtol=0)


def test_conversations_and_plain_inputs_give_the_same_tensors(processor: Any, rng: np.random.Generator) -> None:
    image, audio = random_image(rng), random_audio(rng, 0.2)
    plain = processor(
        text=["Huế", "ghi gì?", ""], images=[None, [image], None], audio=[None, None, audio],
        task=["instr", "ocr", None], return_tensors="pt",
    )  # fmt: skip
    conversations = [user("Huế", system="<instr>"), user(image, "ghi gì?", system="<ocr>"), user(audio)]
    chat = processor.apply_chat_template(conversations, tokenize=True, return_dict=True, return_tensors="pt")
    assert set(chat) == set(plain)
    assert all(torch.equal(chat[name], plain[name]) for name in plain)


# --- tasks, saving, loading --------------------------------------------------------------------------------------


@pytest.fixture
def own_processor(processor: ViPolyQwenProcessor) -> ViPolyQwenProcessor:
    """A processor that a test may change."""
    return copy.deepcopy(processor)


def test_a_new_task_gets_its_own_prefix_token(own_processor: Any, plain_ids: Callable) -> None:
    size = len(own_processor.tokenizer)
    own_processor.add_task("caption", "<caption>")
    end = own_processor.tokenizer.eos_token_id
    assert ids_of(own_processor, text="Huế", task="caption") == [[size, *plain_ids("Huế"), end]]
    assert ids_of(own_processor, text="<caption>Huế") == [[*plain_ids("<caption>Huế"), end]]
    assert chat_ids(own_processor, user("Huế", system="<caption>"))[0][0] == size
    own_processor.add_task("caption", "<caption>")  # again: nothing new
    assert len(own_processor.tokenizer) == size + 1
    assert set(own_processor.task_prefixes) == {*TASK_PREFIXES, "caption"}


def test_a_prefix_that_is_the_beginning_of_another_is_told_apart(own_processor: Any) -> None:
    own_processor.add_task("long", "<ocr>2")
    tokenizer = own_processor.tokenizer
    for task in ("ocr", "long"):
        prefix = own_processor.task_prefixes[task]
        (ids,) = chat_ids(own_processor, user("Huế", system=prefix))
        assert ids[0] == tokenizer.convert_tokens_to_ids(prefix)
        assert [ids] == ids_of(own_processor, text="Huế", task=task)


@pytest.mark.parametrize("prefix", ["a", "", "<|image_pad|>", "<|im_end|>"])
def test_a_prefix_that_texts_or_images_use_already_is_refused(prefix: str, own_processor: Any) -> None:
    assert not prefix or prefix in own_processor.tokenizer.get_vocab()
    with pytest.raises(ValueError, match="prefix"):
        own_processor.add_task("new", prefix)


def test_the_sides_of_a_prefix_are_saved_and_absent_ones_are_side_a(own_processor: Any, tmp_path: Path) -> None:
    own_processor.add_task("text_pair", "<text_pair>", "both")
    own_processor.add_task("audio", "<audio>", "none")
    own_processor.save_pretrained(tmp_path)
    loaded = type(own_processor).from_pretrained(tmp_path)
    found = {task: [loaded.has_prefix(task, side) for side in "ab"] for task in ("text_pair", "audio", "ocr")}
    assert found == {"text_pair": [True, True], "audio": [False, False], "ocr": [True, False]}
    config = tmp_path / "processor_config.json"
    saved = json.loads(config.read_text(encoding="utf-8"))
    del saved["prefix_sides"]  # as a processor saved before sides were recorded
    config.write_text(json.dumps(saved), encoding="utf-8")
    assert set(type(own_processor).from_pretrained(tmp_path).prefix_sides.values()) == {"a"}
    saved["prefix_sides"] = {"ocr": "left"}
    config.write_text(json.dumps(saved), encoding="utf-8")
    with pytest.raises(ValueError, match="'ocr' .* 'left'; write one of a, both, none .`prefix_sides`"):
        type(own_processor).from_pretrained(tmp_path)


def test_a_saved_processor_loads_with_its_tasks_and_limits(
    own_processor: Any, rng: np.random.Generator, tmp_path: Path
) -> None:
    own_processor.add_task("caption", "<caption>")
    own_processor.max_audio_seconds, own_processor.max_audio_windows, own_processor.audio_prefix = 7.5, 3, "fuse"
    own_processor.save_pretrained(tmp_path)
    loaded = ViPolyQwenProcessor.from_pretrained(tmp_path)
    assert loaded.task_prefixes == {**TASK_PREFIXES, "caption": "<caption>"}
    for name in (
        "min_audio_samples",
        "max_audio_seconds",
        "max_audio_windows",
        "audio_prefix",
        "chat_template",
        "image_token_id",
    ):
        assert getattr(loaded, name) == getattr(own_processor, name), name
    assert loaded.tokenizer.model_max_length == own_processor.tokenizer.model_max_length
    assert len(loaded.tokenizer) == len(own_processor.tokenizer)
    inputs = {
        "text": ["Huế <ocr>", "", "ghi gì?"],
        "images": [None, [random_image(rng)], [random_image(rng, 300, 200)]],
        "audio": [random_audio(rng, 0.2, 22_050), None, None],
        "task": ["caption", None, "ocr"],
    }
    before, after = own_processor(**inputs, return_tensors="pt"), loaded(**inputs, return_tensors="pt")
    assert set(before) == set(after)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_other_prefixes_than_the_papers_can_be_chosen(processor: Any, tmp_path: Path) -> None:
    parts = (processor.image_processor, copy.deepcopy(processor.tokenizer), processor.feature_extractor)
    own = ViPolyQwenProcessor(*parts, task_prefixes={"search": "<search>"})
    assert own.task_prefixes == {"search": "<search>"}
    with pytest.raises(ValueError, match="Unknown task 'ocr'; this processor knows search"):
        own(text="Huế", task="ocr")
    own.save_pretrained(tmp_path)
    assert ViPolyQwenProcessor.from_pretrained(tmp_path).task_prefixes == {"search": "<search>"}
    assert ViPolyQwenProcessor(*parts, task_prefixes={}).task_prefixes == {}


def test_arguments_of_one_call_do_not_reach_the_next(processor: ViPolyQwenProcessor) -> None:
    texts = ["một", "hai ba bốn năm sáu"]
    padded = processor(text=texts)["input_ids"]
    assert len({len(ids) for ids in padded}) == 1
    assert len({len(ids) for ids in processor(text=texts, padding=False)["input_ids"]}) == 2
    assert processor(text=texts, padding=True, padding_side="left")["attention_mask"][0][0] == 0
    assert processor(text=texts, text_kwargs={"padding_side": "left"})["attention_mask"][0][0] == 0
    assert processor(text=texts)["input_ids"] == padded
    assert len(processor(text=texts, max_length=4)["input_ids"][1]) == 4
    assert processor(text=texts)["input_ids"] == padded


def test_a_changed_tokenizer_reaches_the_next_call(tiny: tuple) -> None:
    processor = copy.deepcopy(tiny[1])
    texts = ["một", "hai ba bốn năm sáu"]
    assert processor(text=texts)["attention_mask"][0][0] == 1
    processor.tokenizer.padding_side = "left"
    assert processor(text=texts)["attention_mask"][0][0] == 0


def test_the_merged_arguments_of_a_call_may_be_changed(processor: ViPolyQwenProcessor) -> None:
    processor._merge({"padding": True})["text_kwargs"]["padding"] = "broken"
    assert processor._merge({"padding": True})["text_kwargs"]["padding"] is True
    assert processor._merge({"padding": 1})["text_kwargs"]["padding"] == 1

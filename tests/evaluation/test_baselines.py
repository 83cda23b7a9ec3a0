"""The papers' baselines by their Hub names, from a cache of tiny checkpoints with the original files and key names."""

import json
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub.constants
import numpy as np
import pytest
import soundfile
import torch
from helpers import TEXTS, random_audio, random_image
from hub_checkpoints import (
    HUBERT_PREPROCESSOR,
    QWEN2_VL_2B,
    SPEECH,
    qwen2_vl_shapes,
    random_weights,
    save_bin,
    save_shards,
    speech_shapes,
    write_json,
    write_processor_files,
)
from torch.utils.data import DataLoader
from transformers import (
    AutoImageProcessor,
    BertTokenizer,
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
    DistilBertConfig,
    DistilBertModel,
    HubertModel,
    Qwen2VLModel,
)

from vipolyqwen.demo.tiny_base import QWEN2_VL_SPECIAL_TOKENS, train_tokenizer

mteb = pytest.importorskip("mteb")

from mteb.types import PromptType  # noqa: E402

from vipolyqwen.evaluation.custom_tasks import media_table  # noqa: E402
from vipolyqwen.evaluation.dry_run import check_task  # noqa: E402
from vipolyqwen.evaluation.encoder import MeasuredEncoder  # noqa: E402
from vipolyqwen.evaluation.loading import load_encoder  # noqa: E402

HUBERT, QWEN = "facebook/hubert-base-ls960", "Qwen/Qwen2-VL-2B-Instruct"
TEXT_CLIP, IMAGE_CLIP = (f"sentence-transformers/clip-ViT-B-32{end}" for end in ("-multilingual-v1", ""))
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the Hub."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def snapshot(hub: Path, name: str) -> Path:
    """The folder of a cached model's files."""
    repository = hub / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    folder = repository / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    return folder


def load(name: str) -> MeasuredEncoder:
    return load_encoder(name, {}, "cpu", None, False)


def embed(encoder: MeasuredEncoder, modality: str, values: list[Any], prompt_type: PromptType | None = None) -> Any:
    """The vectors of inputs of one modality, in one batch."""
    table = media_table({modality: values}, {modality: modality})
    where = {"task_metadata": mteb.get_task("Flickr30kT2IRetrieval").metadata, "hf_split": "test", "hf_subset": ""}
    vectors = encoder.encode(DataLoader(table, len(values)), prompt_type=prompt_type, **where)
    return torch.as_tensor(np.asarray(vectors))


def png(folder: Path, number: int) -> str:
    path = folder / f"{number}.png"
    random_image(np.random.default_rng(number), 60 + 28 * number, 56).save(path)
    return str(path)


def write_hubert(folder: Path) -> None:
    config = SPEECH["hubert"]
    write_json(folder / "config.json", config)
    write_json(folder / "preprocessor_config.json", HUBERT_PREPROCESSOR)
    save_bin(folder, random_weights(speech_shapes(config), torch.float32))


def test_hubert_is_the_mean_of_its_frames_whatever_stands_beside_a_clip(hub: Path, tmp_path: Path) -> None:
    write_hubert(snapshot(hub, HUBERT))
    rng, paths = np.random.default_rng(0), [str(tmp_path / f"{i}.wav") for i in range(3)]
    for path, seconds in zip(paths, (0.2, 0.7, 0.01), strict=True):
        soundfile.write(path, random_audio(rng, seconds)["array"], 16_000, subtype="FLOAT")
    encoder = load(HUBERT)
    found = embed(encoder, "audio", paths)
    stock = HubertModel.from_pretrained(HUBERT).eval()
    for path, vector in zip(paths, found, strict=True):
        samples = torch.from_numpy(soundfile.read(path, dtype="float32")[0])
        padded = torch.nn.functional.pad(samples, (0, max(0, 420 - len(samples))))  # 420 samples give one frame
        values = (padded - padded.mean()) / (padded.var(correction=0) + 1e-7).sqrt()
        with torch.no_grad():
            expected = stock(values[None]).last_hidden_state[0].mean(dim=0)
        torch.testing.assert_close(vector, expected, rtol=0, atol=1e-5)
    assert encoder.mteb_model_meta.revision == COMMIT
    for task in ("LibriSpeechSpeakerA2ARetrieval", "ESC50"):
        row = check_task(encoder, mteb.get_task(task))
        assert row["status"] == "ok" and "rows embedded" in row["encode"], row["encode"]
    row = check_task(encoder, mteb.get_task("ClothoA2TRetrieval.v2"))
    assert row["encode"] == "not run: it needs text, which the model does not support"


def write_qwen(folder: Path) -> None:
    tokenizer = train_tokenizer(TEXTS * 4, 400)
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("image_pad", "video_pad", "im_end")}
    starts = {
        f"vision_{end}_token_id": tokenizer.convert_tokens_to_ids(f"<|vision_{end}|>") for end in ("start", "end")
    }
    config = {
        **QWEN2_VL_2B,
        **{"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1},
        **{"num_hidden_layers": 2, "vocab_size": len(tokenizer) + 5, "torch_dtype": "float32", **starts},
        **{"image_token_id": ids["image_pad"], "video_token_id": ids["video_pad"], "eos_token_id": ids["im_end"]},
        "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]},
    }
    config["vision_config"] = {**QWEN2_VL_2B["vision_config"], "depth": 1, "embed_dim": 64, "hidden_size": 64}
    config["vision_config"] |= {"num_heads": 2, "mlp_ratio": 2}
    write_json(folder / "config.json", config)
    save_shards(folder, random_weights(qwen2_vl_shapes(config), torch.float32))
    write_processor_files(folder, tokenizer)


def test_qwen2_vl_is_the_mean_of_all_tokens_without_torchvision(hub: Path, tmp_path: Path) -> None:
    write_qwen(snapshot(hub, QWEN))
    encoder = load(QWEN)
    images = [png(tmp_path, number) for number in range(2)]
    found = {"text": embed(encoder, "text", [*TEXTS, "a.png"]), "image": embed(encoder, "image", images)}
    stock = Qwen2VLModel.from_pretrained(QWEN).eval()
    processor = encoder.encoder.prepare.processor
    assert set(QWEN2_VL_SPECIAL_TOKENS) <= set(processor.tokenizer.get_vocab())
    assert "<ocr>" not in processor.tokenizer.get_vocab()  # longer than the embedding table of the checkpoint
    given_to_processor = {
        "text": [{"text": [text]} for text in [*TEXTS, "a.png"]],
        "image": [{"images": [[image]]} for image in images],
    }
    for modality, inputs in given_to_processor.items():
        for given, vector in zip(inputs, found[modality], strict=True):
            batch = processor(**given, return_tensors="pt")
            token_types = (batch["input_ids"] == stock.config.image_token_id).int()
            with torch.no_grad():
                hidden = stock(**batch, mm_token_type_ids=token_types).last_hidden_state[0]
            expected = torch.nn.functional.normalize(hidden.mean(dim=0), dim=0)
            torch.testing.assert_close(vector, expected, rtol=0, atol=1e-5)
    for task in ("Flickr30kI2TRetrieval", "VidoreDocVQARetrieval", "STSBenchmark-VN"):
        row = check_task(encoder, mteb.get_task(task))
        assert row["status"] == "ok" and "rows embedded" in row["encode"], row["encode"]


def test_an_incomplete_backbone_is_refused(tmp_path: Path) -> None:
    write_hubert(tmp_path)
    weights = torch.load(tmp_path / "pytorch_model.bin")
    del weights["encoder.layers.1.layer_norm.weight"]
    save_bin(tmp_path, weights)
    with pytest.raises(ValueError, match=r"1 weights of HubertModel .*encoder\.layers\.1\.layer_norm\.weight"):
        load(str(tmp_path))


def write_text_clip(folder: Path) -> None:
    """DistilBERT, mean pooling and a projection, in the layout of sentence-transformers 2."""
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hai", "sao", "red", "star", *"abcdefghij"]
    tokenizer = BertTokenizer(vocab={word: place for place, word in enumerate(vocabulary)})
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = DistilBertConfig(vocab_size=len(vocabulary), dim=32, hidden_dim=48, n_heads=2, n_layers=1)
    DistilBertModel(config).save_pretrained(folder)
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Dense": "Dense"}
    modules = [
        {"idx": place, "name": str(place), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for place, (path, kind) in enumerate(kinds.items())
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": 128, "do_lower_case": False})
    (folder / "1_Pooling").mkdir()
    (folder / "2_Dense").mkdir()
    pooling = {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}
    write_json(folder / "1_Pooling" / "config.json", pooling)
    dense = {"in_features": 32, "out_features": 16, "bias": False}
    dense["activation_function"] = "torch.nn.modules.linear.Identity"
    write_json(folder / "2_Dense" / "config.json", dense)
    save_bin(folder / "2_Dense", {"linear.weight": torch.randn(16, 32)})


def write_image_clip(folder: Path) -> None:
    """CLIP as sentence-transformers published it: everything in 0_CLIPModel."""
    module = {"idx": 0, "name": "0", "path": "0_CLIPModel", "type": "sentence_transformers.models.CLIPModel"}
    (folder / "modules.json").write_text(json.dumps([module]))
    inner = folder / "0_CLIPModel"
    tokens = ["<|startoftext|>", "<|endoftext|>", "a</w>", "b</w>"]
    CLIPTokenizer(vocab={token: place for place, token in enumerate(tokens)}, merges=[]).save_pretrained(inner)
    text = {"vocab_size": 4, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 2, "bos_token_id": 0, "eos_token_id": 1}
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    torch.manual_seed(1)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    model.save_pretrained(inner)
    preprocessor = {"feature_extractor_type": "CLIPFeatureExtractor", "do_resize": True, "size": 28, "crop_size": 28}
    preprocessor |= {"do_center_crop": True, "do_normalize": True, "resample": 3}
    preprocessor |= {"image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28]}
    write_json(inner / "preprocessor_config.json", preprocessor)


def test_multilingual_clip_embeds_texts_by_one_model_and_images_by_the_other(hub: Path, tmp_path: Path) -> None:
    write_text_clip(snapshot(hub, TEXT_CLIP))
    write_image_clip(snapshot(hub, IMAGE_CLIP))
    encoder = load(TEXT_CLIP)
    texts, images = ["hai sao", "red star a b"], [png(tmp_path, number) for number in range(2)]
    found = [embed(encoder, "text", texts, PromptType.query), embed(encoder, "image", images, PromptType.document)]

    bert = DistilBertModel.from_pretrained(TEXT_CLIP).eval()
    tokenizer = BertTokenizer.from_pretrained(TEXT_CLIP)
    dense = torch.load(hub / f"models--{TEXT_CLIP.replace('/', '--')}/snapshots/{COMMIT}/2_Dense/pytorch_model.bin")
    clip = CLIPModel.from_pretrained(IMAGE_CLIP, subfolder="0_CLIPModel").eval()
    pixels = AutoImageProcessor.from_pretrained(IMAGE_CLIP, subfolder="0_CLIPModel")
    with torch.no_grad():
        for text, vector in zip(texts, found[0], strict=True):
            hidden = bert(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(dim=0)
            torch.testing.assert_close(vector, dense["linear.weight"] @ hidden, rtol=0, atol=1e-5)
        opened = [datasets.Image().decode_example({"path": path, "bytes": None}) for path in images]
        expected = clip.get_image_features(**pixels(opened, return_tensors="pt")).pooler_output
    torch.testing.assert_close(found[1], expected, rtol=0, atol=1e-5)
    assert encoder.mteb_model_meta.modalities == ["image", "text"]
    assert encoder.mteb_model_meta.revision == f"{COMMIT[:12]}-{COMMIT[:12]}"
    for task in ("Flickr30kI2TRetrieval", "Flickr30kT2IRetrieval", "STSBenchmark-VN"):
        row = check_task(encoder, mteb.get_task(task))
        assert row["status"] == "ok" and "rows embedded" in row["encode"], row["encode"]

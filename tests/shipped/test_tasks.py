"""`task="auto"`: which task an input looks like, on inputs written by hand."""

from typing import Any

import numpy as np
import pytest
import torch
from helpers import random_audio, random_image
from sentence_transformers import SentenceTransformer

from vipolyqwen.processing_vipolyqwen import TASK_PREFIXES
from vipolyqwen.publishing.repository import save_repository
from vipolyqwen.tasks_vipolyqwen import infer_task

DIALOGUE = "User: What is this?\nAssistant: A boat.\nUser: Which colour?"


@pytest.mark.parametrize(
    ("text", "images", "has_audio", "task"),
    [
        ("", 0, True, "audio"),
        ("tiếng mưa rơi", 0, True, "audio"),
        ("What is said here?", 1, True, "audio"),
        ("Người dùng: Đây là gì?\nTrợ lý: Con cá.\nNgười dùng: Màu gì?", 1, False, "vqa_multi"),
        ("用户：这是什么？\n助手：一条鱼。\n用户：什么颜色？", 2, False, "vqa_multi"),
        (DIALOGUE, 1, False, "vqa_multi"),
        ("Which is correct?\nA. One.\nB. Two.", 1, False, "vqa_single"),
        ("Biển báo ghi gì?", 1, False, "ocr"),
        ("What does the receipt say?", 1, False, "ocr"),
        ("READ the label.", 1, False, "ocr"),
        ("牌子上写着什么？", 1, False, "ocr"),
        ("Có bao nhiêu con mèo?", 1, False, "vqa_single"),
        ("How many umbrellas are there?", 3, False, "vqa_single"),
        ("天空是什么颜色的？", 1, False, "vqa_single"),
        ("The bread is already spread.", 1, False, "vqa_single"),  # `read` is a word, not a part of one
        ("", 1, False, None),
        (" \n", 2, False, None),
        ("Hãy viết một bài thơ về Huế.", 0, False, "instr"),
        ("Dịch sang tiếng Anh: con cá đỏ", 0, False, "instr"),
        ("Liệt kê ba loại trái cây.", 0, False, "instr"),
        ("Summarize the following article.", 0, False, "instr"),
        ("Câu này nói thế nào bằng tiếng Anh? con cá đỏ", 0, False, "instr"),
        ("请写一首诗。", 0, False, "instr"),
        ("Sort these numbers\n3 1 2", 0, False, "instr"),
        ("Một người đàn ông đang chơi đàn ghi ta.", 0, False, "text_pair"),
        ("A man is playing the guitar.", 0, False, "text_pair"),
        ("一个男人在弹吉他。", 0, False, "text_pair"),
        ("Tesla chết năm nào?", 0, False, "text_pair"),  # a question by itself
        ('Martin said: "I am here."', 0, False, "text_pair"),
        ("", 0, False, None),
    ],
)
def test_the_task_follows_from_shape_and_words(text: str, images: int, has_audio: bool, task: str | None) -> None:
    assert infer_task(text, images, has_audio) == task


def test_auto_gives_each_input_the_prefix_of_its_task(tiny: tuple, rng: np.random.Generator) -> None:
    _, processor = tiny
    texts = ["A man is playing.", "Dịch sang tiếng Anh: con cá", "Biển ghi gì?", "Màu gì?", DIALOGUE, "mưa", ""]
    images = [[], [], *[[random_image(rng)] for _ in range(3)], [], [random_image(rng)]]
    clips = [None] * 5 + [random_audio(rng), None]
    true = ["text_pair", "instr", "ocr", "vqa_single", "vqa_multi", "audio", None]
    given = {"text": texts, "images": images, "audio": clips, "return_tensors": "pt"}
    found = processor(**given, task="auto")["input_ids"]
    assert torch.equal(found, processor(**given, task=true)["input_ids"])
    assert torch.equal(found, processor(**given, task=["auto"] * 6 + [None])["input_ids"])
    off = processor(**given)["input_ids"]
    assert not torch.isin(
        off, torch.tensor(processor.tokenizer.convert_tokens_to_ids(list(TASK_PREFIXES.values())))
    ).any()
    with pytest.raises(ValueError, match=r"Unknown task 'automatic'; this processor knows .*vqa_multi, audio, auto"):
        processor(text="a", task="automatic")
    with pytest.raises(ValueError, match="cannot be called 'auto'"):
        processor.add_task("auto", "<auto>")


def test_sentence_transformers_can_infer_the_task_too(tiny: tuple, tmp_path: Any) -> None:
    save_repository(*tiny, tmp_path)
    encoder = SentenceTransformer(str(tmp_path), trust_remote_code=True, device="cpu")
    texts = ["A man is playing.", "Dịch sang tiếng Anh: con cá"]
    found = encoder.encode(texts, processing_kwargs={"chat_template": {"task": "auto"}})
    assert np.abs(found[0] - encoder.encode(texts[0], prompt_name="text_pair")).max() <= 1e-5
    assert np.abs(found[1] - encoder.encode(texts[1], prompt_name="instr")).max() <= 1e-5

"""The full-size benchmark: what it builds, what it counts, what it writes."""

import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from helpers import HUBERT_BASE_PARAMETERS, QWEN2_VL_2B_PARAMETERS
from torch.utils.flop_counter import FlopCounterMode
from transformers import HubertConfig, Qwen2VLConfig

from vipolyqwen.modeling_vipolyqwen import ViPolyQwenModel
from vipolyqwen.training.build import build_model

pytest.importorskip("peft")


@pytest.fixture
def full_size(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The benchmark as a module, which writes elsewhere."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import full_size
    import result_files

    monkeypatch.setattr(result_files, "RESULTS", tmp_path)
    return full_size


def tiny_configs(layers: int | None = None) -> tuple[Qwen2VLConfig, HubertConfig]:
    """The same architecture, small."""
    text = {"vocab_size": 500, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2}
    special = {"image_token_id": 490, "video_token_id": 491, "vision_start_token_id": 492, "vision_end_token_id": 493}
    audio = HubertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, conv_dim=[16] * 7
    )
    return Qwen2VLConfig(text_config=text, vision_config=vision, **special), audio


def test_it_builds_the_real_sizes(full_size: ModuleType) -> None:
    with torch.device("meta"):
        vlm, audio = full_size.full_size_configs()
        model = ViPolyQwenModel._from_config(build_model(vlm, audio).config)
    count = sum(p.numel() for part in (model.vlm, model.audio_tower) for p in part.parameters())
    assert count == QWEN2_VL_2B_PARAMETERS + HUBERT_BASE_PARAMETERS


TEXT, IMAGE, SOUND = {"length": 40}, {"length": 8, "image_side": 112}, {"audio_seconds": 1}


# For the weight gradient of a grouped convolution torch counts as if there were no groups, so no step with sounds.
@pytest.mark.parametrize(
    ("mode", "kind"), [("encode", TEXT), ("encode", IMAGE), ("encode", SOUND), ("full", TEXT), ("full", IMAGE)]
)
def test_it_counts_the_operations_that_torch_counts(full_size: ModuleType, kind: dict, mode: str) -> None:
    point = full_size.Point(4, **kind)
    model = build_model(*tiny_configs(), attn_implementation="eager")
    take = full_size.stepper(model, mode, checkpointing=False)
    batch = full_size.make_batch(point, model, torch.device("cpu"), torch.float32)
    with FlopCounterMode(display=False) as counter:
        take(batch)
    assert full_size.step_flops(mode, model, point) == pytest.approx(counter.get_total_flops(), rel=0.04)


def test_a_step_with_adapters_counts_neither_them_nor_gradients_of_frozen_weights(full_size: ModuleType) -> None:
    point = full_size.Point(4, **IMAGE)
    model = build_model(*tiny_configs(), attn_implementation="eager")
    batch = full_size.make_batch(point, model, torch.device("cpu"), torch.float32)
    before = full_size.forward_flops(model, point)
    take = full_size.stepper(model, "lora", checkpointing=False)
    assert full_size.forward_flops(model, point) == before
    trained = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name}
    assert trained == set(full_size.new_parts(model))
    with FlopCounterMode(display=False) as step:
        take(batch)
    adapters = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    adapters = 3 * 2 * adapters * point.rows * point.tokens  # large beside layers so small
    counted = full_size.step_flops("lora", model, point) + adapters
    assert counted == pytest.approx(step.get_total_flops(), rel=0.04)


def test_it_writes_finite_numbers_and_no_claims_on_a_cpu(
    full_size: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(full_size, "full_size_configs", tiny_configs)
    flags = ["--tokens", "64", "--lengths", "16", "--image_sides", "56", "--audio_seconds", "1", "--repeats", "1"]
    full_size.main([*flags, "--dtype", "float32", "--gradient_checkpointing"])
    result = json.loads((tmp_path / "full_size.json").read_text(encoding="utf-8"))
    for mode in ("encode", "full", "lora"):
        assert [row["rows"] for row in result["table"][mode]] == [4, 2, 2]
        for row in result["table"][mode]:
            for name in ("seconds", "samples_per_second", "peak_gib", "tera_flops", "mfu"):
                assert 0 <= row[name] < float("inf"), (row, name)
            assert row["seconds"] > 0 and row["peak_gib"] > 0
        assert result["claims"][f"best_mfu_{mode}"]["holds"] is None


def test_a_point_without_memory_is_recorded_and_the_next_one_measured(
    full_size: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def take(batch: dict) -> None:
        if batch["input_ids"].shape[1] > 20:
            torch.empty(2**60)

    monkeypatch.setattr(full_size, "stepper", lambda *_: take)
    options = full_size.read_options(["--tokens", "64", "--lengths", "32", "16", "--image_sides", "--audio_seconds"])
    rows = full_size.measure_mode("encode", tiny_configs(), torch.device("cpu"), torch.float32, 1e12, options)
    assert "allocate memory" in rows[0]["out_of_memory"] and "mfu" not in rows[0]
    assert "out_of_memory" not in rows[1] and rows[1]["seconds"] > 0

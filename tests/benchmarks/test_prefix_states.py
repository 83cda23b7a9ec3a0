"""What a prefix changes inside: nothing before the first layer, something after it."""

from pathlib import Path

from helpers import load_with_prefixes
from prefix_states import distances, report

from vipolyqwen.data.sources import load_pairs


def test_a_prefix_reaches_the_other_tokens_through_the_layers(world: Path) -> None:
    model, processor, tasks = load_with_prefixes(world / "base")
    pairs = load_pairs([{"path": str(world / "pairs.jsonl")}], tasks, processor.min_audio_samples)
    found = {name: distances(model, processor, tasks, pairs, name, 2) for name in ("ocr", "text_pair", "audio")}
    assert found["audio"] == {}  # audio alone has no tokens
    for task in ("ocr", "text_pair"):
        first, *later = found[task]["layers"]
        assert abs(first) < 1e-6 and len(later) == 1 and later[0] > 1e-4
        assert found[task]["vector"] > 1e-4 and found[task]["other_vector"] > 1e-4
    page = report({"distances": {"ocr": found["ocr"]}, "command": "x", "machine": "y"})
    assert "| ocr | 0.000 |" in page

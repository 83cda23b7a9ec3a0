"""Exports the text route to ONNX: token ids in, unit vectors out.

    python export_vipolyqwen.py MODEL --out DIR

Language model, pooling, projection and normalisation are inside; any batch size and length. Images and audio stay with
the PyTorch model, whose vectors these ones match: onnxruntime and the model embed the same texts, and the file is
refused if a component differs by more than 1e-4. DIR receives model.onnx (weights of large models beside it) and the
processor's files.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import AutoModel, AutoProcessor, PreTrainedModel, ProcessorMixin

from vipolyqwen import __version__
from vipolyqwen.data.command_line import run_command
from vipolyqwen.pooling_vipolyqwen import unit_vectors

FILE_NAME = "model.onnx"
TOLERANCE = 1e-4
TEXTS = [
    "Huế",
    "Bốn bông hoa đỏ lớn trên trời.",
    "沙滩上有三个蓝色的小球。",
    "A long text: " + "one vector for text, images and audio; " * 8,
]


class TextRoute(nn.Module):
    """Text route of a model, with a plain mask in place of the library's, so that shapes stay dynamic."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.language_model = model.vlm.language_model
        self.pooling, self.projection = model.pooling, model.projection

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Returns (batch, projection_dim) float32 unit vectors.

        Args:
            input_ids: (batch, tokens) int64, text only.
            attention_mask: (batch, tokens) int64, 1 for real tokens, padding on either side.
        """
        real = attention_mask.bool()
        positions = (attention_mask.cumsum(dim=-1) - 1).clamp(min=0).expand(3, -1, -1)
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        earlier = places[None, :] <= places[:, None]
        itself = places[None, :] == places[:, None]  # a row of padding sees itself, or its softmax would be NaN
        seen = (earlier & real[:, None, None, :]) | itself
        hidden = self.language_model(
            inputs_embeds=self.language_model.embed_tokens(input_ids),
            position_ids=positions,
            attention_mask={"full_attention": seen, "sliding_attention": seen},
            use_cache=False,
        ).last_hidden_state
        pooled, _ = self.pooling(hidden, real)
        return unit_vectors(self.projection(pooled).float())


def main(argv: list[str] | None = None) -> None:
    """Exports and compares."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"vipolyqwen {__version__}")
    parser.add_argument("model", help="folder or Hub id; its code runs")
    parser.add_argument("--out", type=Path, required=True, help="folder of the files")
    parser.add_argument("--revision", help="branch, tag or commit of the model")
    options = parser.parse_args(argv)
    if (options.out / FILE_NAME).exists():
        raise ValueError(f"{options.out / FILE_NAME} exists; remove it, or name another folder.")
    common = {"revision": options.revision, "trust_remote_code": True}
    model = AutoModel.from_pretrained(options.model, dtype=torch.float32, attn_implementation="sdpa", **common).eval()
    processor = AutoProcessor.from_pretrained(options.model, **common)
    check_layers(model)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / FILE_NAME
    export(model, processor, path)
    worst = compare(model, processor, path)
    if not worst <= TOLERANCE:
        path.unlink()
        raise ValueError(f"{path} differs from the model by {worst:.2g}; the limit is {TOLERANCE:g}: not exported.")
    processor.save_pretrained(options.out)
    print(f"{path}: differs from the model by at most {worst:.2g}")


def check_layers(model: PreTrainedModel) -> None:
    """Raises a ValueError if a layer of the language model has a sliding window, which the exported mask lacks."""
    sliding = model.config.text_config.layer_types.count("sliding_attention")
    if sliding:
        raise ValueError(f"{sliding} layers have a sliding window; only full attention can be exported.")


def export(model: PreTrainedModel, processor: ProcessorMixin, path: Path) -> None:
    """Writes the text route."""
    batch = tokens_of(processor, TEXTS[:2])
    dynamic = {0: torch.export.Dim("batch", min=1), 1: torch.export.Dim("tokens", min=1)}
    torch.onnx.export(
        TextRoute(model).eval(),
        (batch["input_ids"], batch["attention_mask"]),
        path,
        input_names=["input_ids", "attention_mask"],
        output_names=["embeddings"],
        dynamic_shapes={"input_ids": dynamic, "attention_mask": dynamic},
        dynamo=True,
        external_data=model.num_parameters() * 4 > 1.5e9,
    )


def tokens_of(processor: ProcessorMixin, texts: list[str]) -> dict[str, torch.Tensor]:
    """Returns the ids and the mask of texts."""
    batch = processor(text=texts, return_tensors="pt")
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


@torch.inference_mode()
def compare(model: PreTrainedModel, processor: ProcessorMixin, path: Path) -> float:
    """Returns the largest difference of a component between onnxruntime and the model, over lengths and batches."""
    import onnxruntime  # pyright: ignore[reportMissingImports]

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    worst = 0.0
    for texts in ([TEXTS[0]], [TEXTS[3]], TEXTS[1:3], TEXTS, TEXTS * 2):
        batch = tokens_of(processor, texts)
        found = session.run(["embeddings"], {name: value.numpy() for name, value in batch.items()})[0]
        worst = max(worst, float(np.abs(found - model(**batch).embeddings.numpy()).max()))
    return worst


if __name__ == "__main__":
    run_command(main)

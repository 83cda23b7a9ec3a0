"""A trained model to a repository that others load: weights, code, processor, sentence-transformers files."""

import json
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, ProcessorMixin

# The lowest versions that were tried; sentence-transformers checks them before it loads anything.
REQUIREMENTS = {"sentence-transformers": ">=6.0.1", "transformers": ">=5.17"}

MODULES = [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.base.modules.transformer.Transformer"}]


def sentence_transformers_files(processor: ProcessorMixin, has_audio: bool) -> dict[str, Any]:
    """File name -> content of what makes the stock modules of sentence-transformers load and feed the model."""
    modalities = ["text", "image", *(["audio"] if has_audio else []), "message"]
    route = {"method": "forward", "method_output_name": "embeddings"}
    return {
        "modules.json": MODULES,
        "sentence_bert_config.json": {
            "transformer_task": "feature-extraction",
            "modality_config": {name: dict(route) for name in modalities}
            | {"message": {**route, "format": "structured"}},
            "module_output_name": "sentence_embedding",
            "unpad_inputs": False,
        },
        "config_sentence_transformers.json": {
            "model_type": "SentenceTransformer",
            "requirements": REQUIREMENTS,
            "prompts": dict(processor.task_prefixes),
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
        },
    }


def save_repository(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    folder: str | PathLike,
    state_dict: dict[str, torch.Tensor] | None = None,
) -> None:
    """Writes a whole repository: `AutoModel`, `AutoProcessor` and `SentenceTransformer` load the folder as it is.

    Args:
        model: the model; its code is copied along.
        processor: its processor, whose task prefixes become the prompts.
        folder: where to; created if it is not there.
        state_dict: weights to write in place of the model's own, as a sharded trainer gathers them.
    """
    folder = Path(folder)
    model.save_pretrained(folder, state_dict=state_dict)
    processor.save_pretrained(folder)
    files = sentence_transformers_files(processor, has_audio=model.config.audio_config is not None)
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

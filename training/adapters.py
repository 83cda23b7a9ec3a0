"""LoRA and DoRA adapters (peft), and QLoRA with bitsandbytes.

Newly initialised modules cannot be expressed as a low-rank update, so poolings, projections and the embedding rows of
the task prefixes are trained in full. An adapter names its base, a repository; a base built from backbones is written
into the output folder.
"""

import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.utils import is_bitsandbytes_available, is_peft_available

from ..configuration_vipolyqwen import CHOICES
from ..data.names import did_you_mean
from ..modeling_vipolyqwen import ViPolyQwenModel
from ..processing_vipolyqwen import ViPolyQwenProcessor
from ..publishing.repository import ADAPTER_CONFIG, save_repository
from .arguments import ModelArguments, ViPolyQwenTrainingArguments
from .checkpoints import UNFINISHED, list_checkpoints, publish_checkpoint
from .parts import NEW_PARTS, TOWERS

if TYPE_CHECKING:
    from peft import PeftModel

BASE = "base"  # in the output folder: the base of the adapter, unless it is a repository elsewhere
ADAPTER = "adapter"  # in the output folder: the adapter that is merged into the model saved there

# The linear layers of attention and MLP, below a tower's path in TOWERS.
TOWER_LAYERS = {
    "language": r"layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)",
    "vision": r"blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc[12])",
    "audio": r"encoder\.layers\.\d+\.(attention\.(q|k|v|out)_proj|feed_forward\.(intermediate|output)_dense)",
}
# WavLM's attention reads the weights of its linear layers without calling them, which bypasses an adapter.
WAVLM_LAYERS = r"encoder\.layers\.\d+\.feed_forward\.(intermediate|output)_dense"

# Fields of an adapter's configuration that must be equal to resume it.
IDENTITY = ("r", "lora_alpha", "use_dora", "target_modules", "modules_to_save", "trainable_token_indices")


def check_installed(model_args: ModelArguments, device: torch.device) -> None:
    """Checks peft, bitsandbytes and the device, before anything is loaded.

    Raises:
        ImportError: `lora_rank` or `load_in_4bit` needs a package that is not installed.
        ValueError: `load_in_4bit` without CUDA.
    """
    if model_args.lora_rank is not None and not is_peft_available():
        raise ImportError(
            f"`lora_rank` is {model_args.lora_rank}, and adapters need peft, which is not installed: pip install peft"
        )
    if model_args.load_in_4bit and device.type != "cuda":
        raise ValueError(
            f"`load_in_4bit` needs a CUDA device, and this run is on {device.type}. Leave it out: `lora_rank` alone "
            "trains the same parameters, on a base that is not quantised."
        )
    if model_args.load_in_4bit and not is_bitsandbytes_available():
        raise ImportError(
            "`load_in_4bit` needs bitsandbytes, which is not installed, or too old: pip install -U bitsandbytes; or "
            "leave it out."
        )


def find_targets(model: ViPolyQwenModel, targets: list[str], frozen: list[str]) -> dict[str, list[str]]:
    """Finds the linear layers to adapt.

    Args:
        model: the model.
        targets: names of towers, for the linear layers of their attention and MLP, or last parts of layer names, in
            all towers.
        frozen: towers without adapter.

    Returns:
        regular expression -> full names of the layers that it matches, one entry a target.

    Raises:
        ValueError: a target matches a module that is not a linear layer, none in a trained tower, or one that WavLM
            bypasses.
    """
    towers = {name: path for name, path in TOWERS.items() if name not in frozen}
    if model.config.audio_config is None:
        towers.pop("audio", None)
    inside = "|".join(map(re.escape, towers.values()))
    modules = dict(model.named_modules())
    linear = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
    adapted = {}
    for target in targets:
        if target in towers:
            pattern = rf"{re.escape(towers[target])}\.{_layers(model, target)}"
        else:
            pattern = rf"({inside})\.(.+\.)?{re.escape(target)}"
        found = [name for name in modules if re.fullmatch(pattern, name)]
        if not found or not set(found) <= set(linear):
            ends = {name.rsplit(".", 1)[-1] for name in linear if re.match(rf"({inside})\.", name)}
            known = sorted(end for end in ends if not end.isdigit())
            raise ValueError(
                f"`lora_targets` names {target!r}, which matches no linear layer of a trained tower."
                f"{did_you_mean(target, [*towers, *known])} "
                f"Name towers ({', '.join(towers)}) or layers ({', '.join(known)})."
            )
        bypassed = [name for name in found if _is_bypassed(model, name)]
        if bypassed:
            raise ValueError(
                f"`lora_targets` names {target!r}, which matches {bypassed[0]}: WavLM's attention reads the "
                "weights of that layer without calling it, which bypasses an adapter. Name towers, or `freeze` audio."
            )
        adapted[pattern] = found
    return adapted


def _layers(model: ViPolyQwenModel, tower: str) -> str:
    is_wavlm = tower == "audio" and model.config.audio_config.model_type == "wavlm"
    return WAVLM_LAYERS if is_wavlm else TOWER_LAYERS[tower]


def _is_bypassed(model: ViPolyQwenModel, name: str) -> bool:
    in_audio = name.startswith(f"{TOWERS['audio']}.") and model.config.audio_config.model_type == "wavlm"
    return in_audio and ".attention." in name


def untrained_towers(model: ViPolyQwenModel, model_args: ModelArguments) -> list[str]:
    """Returns the towers without trained parameters: frozen ones, and vision and audio without adapter.

    The language model counts only if it is frozen: otherwise the rows of its task prefixes are trained.
    """
    targets = find_targets(model, model_args.lora_targets, model_args.freeze)
    layers = [name for found in targets.values() for name in found]
    present = ["vision"] if model.config.audio_config is None else ["vision", "audio"]
    without = [tower for tower in present if not any(name.startswith(f"{TOWERS[tower]}.") for name in layers)]
    return [tower for tower in TOWERS if tower in model_args.freeze or tower in without]


def new_modules(model: ViPolyQwenModel) -> list[str]:
    """Returns the names of the modules with weights in the new parts.

    They are listed individually because peft matches suffixes: `projection` would also match a layer of HuBERT.
    """
    return [
        name
        for name, module in model.named_modules()
        if name.split(".")[0] in NEW_PARTS and list(module.parameters(recurse=False))
    ]


def add_adapter(
    model: ViPolyQwenModel,
    processor: ViPolyQwenProcessor,
    model_args: ModelArguments,
    base: str,
    mixed_precision: bool = False,
) -> "PeftModel":
    """Adds an adapter; freezes all but it, the new parts and the embedding rows of the task prefixes.

    Args:
        model: the model in `base`; changed in place.
        processor: its processor, with the task prefixes.
        model_args: rank, alpha, dropout, targets and frozen towers.
        base: repository of the base, a Hub id or a folder.
        mixed_precision: whether the forward pass is autocast; trained parameters are then float32.

    Returns:
        the model with its adapter.
    """
    from peft import LoraConfig, get_peft_model

    prefixes = processor.tokenizer.convert_tokens_to_ids(sorted(set(processor.task_prefixes.values())))
    config = LoraConfig(
        r=model_args.lora_rank,
        lora_alpha=2 * model_args.lora_rank if model_args.lora_alpha is None else model_args.lora_alpha,
        lora_dropout=model_args.lora_dropout,
        use_dora=model_args.use_dora,
        target_modules="|".join(find_targets(model, model_args.lora_targets, model_args.freeze)),
        modules_to_save=new_modules(model),
        trainable_token_indices=None if "language" in model_args.freeze else {"embed_tokens": prefixes},
    )
    on_hub = not Path(base).is_dir()
    adapted = get_peft_model(model, config)
    config.base_model_name_or_path = base if on_hub else str(Path(base).resolve())
    config.revision = model.config._commit_hash if on_hub else None
    for parameter in adapted.parameters():
        if parameter.requires_grad and mixed_precision:  # half precision would round small updates away
            parameter.data = parameter.data.float()
    return adapted


def continued(model_args: ModelArguments, args: ViPolyQwenTrainingArguments) -> ModelArguments:
    """Returns the arguments; to resume a run that wrote a base, `model` is that base in place of the backbones."""
    resume = args.resume_from_checkpoint
    run = Path(resume).parent if isinstance(resume, str) else Path(args.output_dir)
    if not resume or not (run / BASE).is_dir() or not list_checkpoints(run):
        return model_args
    built = dict.fromkeys(("vlm", "audio", *CHOICES))
    return replace(model_args, model=str(run / BASE), **built)


def write_base(model: ViPolyQwenModel, processor: ViPolyQwenProcessor, args: ViPolyQwenTrainingArguments) -> str:
    """Writes the model into the output folder as the base of its adapter, atomically; returns that folder."""
    folder = Path(args.output_dir) / BASE
    with args.main_process_first(local=args.save_on_each_node, desc="writing the base of the adapter"):
        if args.should_save:
            written = folder.parent / UNFINISHED / BASE
            save_repository(model, processor, written)
            publish_checkpoint(written, folder)
    return str(folder)


def load_in_4bit(base: str, attention: str, args: ViPolyQwenTrainingArguments) -> PreTrainedModel:
    """Loads the base with its language model in 4 bits (QLoRA, Dettmers et al. 2023).

    The other parts keep their dtype.

    Args:
        base: repository of the base, a Hub id or a folder.
        attention: attention kernel.
        args: device and dtype (`bf16`, `fp16`) of the run.
    """
    from peft import prepare_model_for_kbit_training

    kept = [TOWERS["vision"], TOWERS["audio"], *NEW_PARTS]
    quantisation = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32,
        llm_int8_skip_modules=kept,
    )
    model = ViPolyQwenModel.from_pretrained(
        base, quantization_config=quantisation, device_map={"": args.device}, attn_implementation=attention
    )
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)  # left to the Trainer


def check_adapter(model: nn.Module, checkpoint: Path) -> None:
    """Compares the adapter of a checkpoint with that of the model to resume.

    Raises:
        ValueError: only one of them has an adapter, or their configurations differ.
    """
    stored, here = (checkpoint / ADAPTER_CONFIG).is_file(), is_adapted(model)
    if stored != here:
        raise ValueError(
            f"{checkpoint} holds {'an adapter' if stored else 'a full model'}, and this run trains "
            f"{'an adapter' if here else 'a full model'}. Resume it {'with' if stored else 'without'} `lora_rank`."
        )
    if not here:
        return
    from peft import PeftConfig

    old, new = PeftConfig.from_pretrained(checkpoint), model.peft_config["default"]
    for name in IDENTITY:
        before, now = getattr(old, name), getattr(new, name)
        if before != now:
            raise ValueError(
                f"The adapter in {checkpoint} has {name} {before!r}, and this run has {now!r}. Resume it with the "
                "settings of its run, or start a new run."
            )


def is_adapted(model: nn.Module) -> bool:
    """Returns whether a model has a peft adapter."""
    if not is_peft_available():
        return False
    from peft import PeftModel

    return isinstance(model, PeftModel)

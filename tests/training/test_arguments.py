"""No argument is dropped: each stock one is honoured or refused by name; values have the type of their argument."""

import json
import os
import runpy
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from transformers import TrainingArguments

from vipolyqwen.data.command_line import run_command
from vipolyqwen.data.yaml_files import read_yaml
from vipolyqwen.training.argument_checks import LOADER_OPTIONS, REFUSED
from vipolyqwen.training.arguments import read_arguments

ROOT = Path(__file__).parents[2]
# Every other argument of transformers 5.17 to 5.23: a new one has to be honoured, or refused in `REFUSED`.
HONOURED = """\
output_dir per_device_train_batch_size num_train_epochs max_steps learning_rate lr_scheduler_type
lr_scheduler_kwargs warmup_steps optim optim_args weight_decay adam_beta1 adam_beta2 adam_epsilon
gradient_accumulation_steps max_grad_norm bf16 fp16 tf32 activation_checkpointing activation_checkpointing_kwargs
gradient_checkpointing gradient_checkpointing_kwargs torch_compile torch_compile_backend torch_compile_mode
use_liger_kernel neftune_noise_alpha torch_empty_cache_steps logging_strategy logging_steps logging_first_step
log_on_each_node logging_nan_inf_filter include_num_input_tokens_seen log_level log_level_replica disable_tqdm
report_to run_name project trackio_space_id trackio_bucket_id trackio_static_space_id eval_strategy eval_steps
eval_delay per_device_eval_batch_size eval_on_start save_only_model save_strategy save_steps save_on_each_node
save_total_limit enable_jit_checkpoint push_to_hub hub_token hub_private_repo hub_model_id hub_strategy
hub_always_push hub_revision load_best_model_at_end metric_for_best_model greater_is_better ignore_data_skip
restore_callback_states_from_checkpoint full_determinism seed data_seed use_cpu accelerator_config
dataloader_drop_last dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers
dataloader_prefetch_factor dataloader_multiprocessing_context remove_unused_columns ddp_find_unused_parameters
ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout fsdp fsdp_config deepspeed debug
skip_memory_metrics do_train do_eval resume_from_checkpoint local_rank
""".split()
VALUES = {  # of the refused arguments, other than their defaults
    "label_smoothing_factor": 0.1,
    "average_tokens_across_devices": False,
    "label_names": ["a"],
    "include_for_metrics": ["loss"],
    "eval_do_concat_batches": False,
    "eval_accumulation_steps": 2,
    "train_sampling_strategy": "group_by_length",
    "length_column_name": "tokens",
    "dataloader_in_order": False,
    "optim_target_modules": ["all-linear"],
    "liger_kernel_config": {"rope": True},
    "parallelism_config": {"cp_size": 2},
}


def recipe(tmp_path: Path, **values: object) -> str:
    path = tmp_path / "recipe.yaml"
    given = {"model": "x", "output_dir": "x", "use_cpu": True, "report_to": "none", **values}
    path.write_text("\n".join(f"{name}: {json.dumps(value)}" for name, value in given.items()), encoding="utf-8")
    return str(path)


def test_every_stock_argument_is_honoured_or_refused() -> None:
    names = {item.name for item in fields(TrainingArguments)}
    assert names - {*HONOURED, *REFUSED} == set()
    assert not set(HONOURED) & set(REFUSED) and set(REFUSED) <= names


@pytest.mark.parametrize("name", REFUSED)
def test_an_argument_without_effect_is_refused_by_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=rf"`{name}` is .* no effect here"):
        read_arguments([recipe(tmp_path, **{name: VALUES.get(name, True)})])


@pytest.mark.parametrize(("name", "value"), zip(LOADER_OPTIONS, (True, True, False, False), strict=True))
def test_an_option_of_another_loader_is_refused_by_name(tmp_path: Path, name: str, value: bool) -> None:
    with pytest.raises(ValueError, match=rf"`accelerator_config` has `{name}` {value}"):
        read_arguments([recipe(tmp_path, accelerator_config={name: value})])


def test_numbers_of_a_recipe_may_have_an_exponent_without_a_point(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "model: x\noutput_dir: x\nuse_cpu: true\nlearning_rate: 1e-4\nadam_epsilon: '1e-6'\nmax_steps: '7'\n"
    )
    path.write_text(path.read_text() + "temperature: {text-text: 5E-2}\nbf16: 'false'\nwarmup_steps: 3\n")
    _, _, loss, args = read_arguments([str(path)])
    assert (args.learning_rate, args.adam_epsilon, args.max_steps, args.bf16) == (1e-4, 1e-6, 7, False)
    assert loss.temperature == {"text-text": 0.05} and args.warmup_steps == 3
    numbers = tmp_path / "numbers.yaml"
    numbers.write_text("[1e-4, -1E+3, .5e1, 1.e2, 1e, e5, 1-4, '1e-4', 12, 1.5, v1e3, 1e3x]")
    assert read_yaml(numbers) == [1e-4, -1e3, 5.0, 100.0, "1e", "e5", "1-4", "1e-4", 12, 1.5, "v1e3", "1e3x"]


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("learning_rate", "fast", "a number"),
        ("learning_rate", True, "a number"),
        ("learning_rate", [1e-4], "a number"),
        ("max_steps", 1.5, "a whole number"),
        ("max_steps", None, "a whole number"),
        ("bf16", "yes", "true or false"),
        ("mask_duplicates", 1, "true or false"),
        ("embed_chunk", "1e2", "a whole number"),
    ],
)
def test_a_value_of_another_type_is_named(tmp_path: Path, name: str, value: object, kind: str) -> None:
    with pytest.raises(ValueError, match=rf"recipe.yaml: `{name}` is .*; it must be {kind}"):
        read_arguments([recipe(tmp_path, **{name: value})])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--pooling max", "`pooling` is 'max'; it must be one of attention, mean, last"),
        ("--audio_fusion sum", "`audio_fusion` is 'sum'"),
        ("--max_pixels 3136 --min_pixels 6272", "`max_pixels` is 3136, below `min_pixels`, which is 6272"),
        ("--max_length 0", "`max_length` is 0"),
        ("--max_audio_seconds -1", "`max_audio_seconds` is -1"),
        ("--max_steps 0", "`max_steps` is 0"),
        ("--num_train_epochs 0", "`num_train_epochs` is 0"),
        ("--per_device_train_batch_size 0", "`per_device_train_batch_size` is 0"),
        ("--gradient_accumulation_steps 0", "`gradient_accumulation_steps` is 0"),
    ],
)
def test_a_value_out_of_range_is_named(flags: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_arguments(["--model", "x", "--output_dir", "x", "--use_cpu", "true", *flags.split()])


def test_an_error_of_the_user_is_one_message_and_others_are_tracebacks(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    def ends_with(function: object) -> object:
        with pytest.raises(SystemExit) as end:
            run_command(function)
        return end.value.code

    assert ends_with(lambda: None) is None and ends_with(lambda: 1) == 1
    assert ends_with(lambda: read_arguments(["missing.yaml"])) == 2
    assert capsys.readouterr().err == "error: The recipe 'missing.yaml' does not exist; see recipes/ for examples.\n"
    assert ends_with(lambda: read_yaml(Path("missing.yaml"))) == 2
    capsys.readouterr()
    with pytest.raises(ValueError, match="invalid literal"):
        run_command(lambda: int("a fault of the code"))
    of_the_model = tmp_path / "transformers_modules" / "modeling.py"  # code that came with a repository
    of_the_model.parent.mkdir()
    of_the_model.write_text("raise ValueError('a wrong tower')", encoding="utf-8")
    assert ends_with(lambda: runpy.run_path(str(of_the_model))) == 2
    assert capsys.readouterr().err == "error: a wrong tower\n"


@pytest.mark.slow
def test_the_command_prints_one_line_and_exits_with_2(tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "train_vipolyqwen.py", "--model", "x", "--output_dir", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: `train_data` and `eval_data` are both missing")
    assert "Traceback" not in done.stderr

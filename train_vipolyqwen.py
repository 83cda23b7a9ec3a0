"""Trains a model, also under `accelerate launch`.

python train_vipolyqwen.py RECIPE.yaml [MORE.yaml …] [--any_argument value]
"""

import sys
from pathlib import Path

from vipolyqwen.data.command_line import run_command

if {"-h", "--help"} & {*sys.argv[1:]}:  # for which transformers need not import peft, half of the time
    sys.modules.setdefault("peft", None)  # pyright: ignore[reportArgumentType]

from vipolyqwen.training.arguments import Arguments, read_arguments, read_paths

if sys.modules.get("peft", sys) is None:
    del sys.modules["peft"]


def main(argv: list[str] | None = None) -> None:
    """Reads the arguments, trains, evaluates and saves a repository to `output_dir`."""
    arguments = read_arguments(sys.argv[1:] if argv is None else argv)
    _, data_args, _, args = arguments
    if data_args.train_data is None and data_args.eval_data is None:
        raise ValueError(
            "`train_data` and `eval_data` are both missing, so nothing would be trained or evaluated. Name pairs in a "
            "recipe: `train_data: [{path: pairs.jsonl}]` (docs/training.md)."
        )
    from vipolyqwen.training.distributed import end_process_group  # after the arguments: `--help` loads no Trainer
    from vipolyqwen.training.faults import StoppedRun
    from vipolyqwen.training.output_folder import occupy

    with occupy(args, read_paths(arguments)):
        try:
            run(arguments)
        except StoppedRun as stopped:
            print(stopped, file=sys.stderr)
            stopped.__traceback__ = None  # its frames hold the Trainer
            end_process_group()
            raise


def run(arguments: Arguments) -> None:
    """Trains and evaluates as the arguments say."""
    from accelerate.utils import broadcast_object_list
    from transformers import set_seed
    from transformers.trainer_callback import ProgressCallback

    from vipolyqwen.training import build
    from vipolyqwen.training.callbacks import CompactProgressCallback
    from vipolyqwen.training.distributed import unsharded_loading
    from vipolyqwen.training.output_folder import describe_result
    from vipolyqwen.training.run_record import write_record
    from vipolyqwen.training.run_settings import describe_settings
    from vipolyqwen.training.trainer import ViPolyQwenTrainer

    model_args, data_args, loss_args, args = arguments
    set_seed(args.seed)
    tasks = build.build_tasks(data_args)
    mixed_loss = build.build_loss(loss_args, data_args.tasks, list(tasks))
    with unsharded_loading(args):
        model, processor = build.load_model(model_args, args, tasks)
    bad = {"on_bad_row": data_args.on_bad_row, "max_bad_rows": data_args.max_bad_rows}
    train_pairs = build.read_train_pairs(data_args, tasks, processor)
    eval_pairs = build.read_pairs(data_args.eval_data, tasks, processor, data_args.check_media, **bad)
    teacher_width = build.connect_teacher(mixed_loss, train_pairs, model, loss_args, args)
    collated = (processor, tasks, data_args, args)
    trainer = ViPolyQwenTrainer(
        model=model,
        args=args,
        processor=processor,
        mixed_loss=mixed_loss,
        train_dataset=train_pairs,
        eval_dataset=eval_pairs,
        train_collator=build.build_collator(*collated, training=True, teacher_width=teacher_width),
        eval_collator=build.build_collator(*collated, training=False),
        max_bad_rows=data_args.max_bad_rows,
    )
    if not args.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(CompactProgressCallback)
    described = None  # other ranks may hold no weights yet
    if args.process_index == 0:
        described = describe_settings(arguments, model, processor, train_pairs, eval_pairs)
    [trainer.settings] = broadcast_object_list([described])
    checkpoint = None if train_pairs is None else trainer.choose_checkpoint(args.resume_from_checkpoint)
    if args.should_save:
        write_record(Path(args.output_dir), arguments, train_pairs, eval_pairs, trainer.history)
    if train_pairs is not None:
        trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_model()
        trainer.save_state()
        if trainer.is_world_process_zero():
            print(describe_result(args, trainer.state), flush=True)
    if eval_pairs is not None and (train_pairs is None or args.eval_strategy == "no"):
        trainer.save_metrics("eval", trainer.evaluate())


def command() -> None:
    """Runs the command and ends all ranks together."""
    main()
    from vipolyqwen.training.distributed import end_process_group

    end_process_group()


if __name__ == "__main__":
    run_command(command)

"""Batches of a run that are filled to `batch_tokens` and `batch_pixels`."""

import math

from transformers.utils import logging

from ..data.budget import BudgetBatches
from ..data.row_costs import KINDS, row_costs
from ..data.sampler import MixtureSampler
from ..data.sources import PairDataset
from ..processing_vipolyqwen import ViPolyQwenProcessor
from .arguments import ViPolyQwenTrainingArguments

logger = logging.get_logger(__name__)


def has_budget(args: ViPolyQwenTrainingArguments) -> bool:
    """Returns whether batches are filled to a budget, in place of a fixed number of rows."""
    return args.batch_tokens is not None or args.batch_pixels is not None


def budget_batches(
    pairs: PairDataset, processor: ViPolyQwenProcessor, sampler: MixtureSampler, args: ViPolyQwenTrainingArguments
) -> BudgetBatches:
    """Returns the batches of this rank; measures the rows, and warns of those that exceed a budget alone.

    Args:
        pairs: the pairs to train on.
        processor: the model's processor.
        sampler: the order of the rows.
        args: the arguments of the run.
    """
    costs = row_costs(pairs, processor)
    budgets = [math.inf if budget is None else budget for budget in (args.batch_tokens, args.batch_pixels)]
    for name, budget, column in zip(KINDS, budgets, costs.T, strict=True):
        beyond = int((column > budget).sum())
        if beyond:
            logger.warning(
                f"{beyond} of {len(column)} rows have more than the {budget} {name} of `batch_{name}`, "
                f"up to {int(column.max())}; each is a batch of its rank alone."
            )
    shares = (args.process_index, args.world_size, args.dataloader_drop_last)
    return BudgetBatches(sampler, args.train_batch_size, costs, budgets, *shares)

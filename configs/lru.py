"""LRU (Orvieto et al. 2023): a deep stack of diagonal linear recurrences.

  python -m lra_jax.main --config configs/lru.py:digits
  python -m lra_jax.main --config configs/lru.py                   sequential CIFAR-10; the paper reports 89.0
  python -m lra_jax.main --config configs/lru.py:listops           also :text, :retrieval
  python -m lra_jax.main --config configs/lru.py:lra_image_real,variant=large     also :pathfinder_real, :path_x_real

The paper's hyper-parameters we could not read. Sequences and pictures get the sequential CIFAR command of
NicolasZucchet/minimal-LRU: 180 epochs at batch 64, AdamW 1e-3 with decay 0.05, half of it without decay for the
recurrence, cosine to 1e-7. The Long Range Arena: `configs.common.lra_recipe` and sizes of ours (docs/lra.md), at that
rate of the recurrence; on Path-X |λ| starts above 0.999, so that a step is remembered.
"""

from configs import common

TASKS = common.tasks_with("cifar10_sequence")
VARIANTS = {"base": "lru", "large": "lru_large", "digits": "lru_digits"}
SIZES = {
  "retrieval": dict(width=192, states=96),
  "lra_image": dict(width=96, depth=5, states=64),
  "path_x": dict(width=128, depth=5, states=128, r_min=0.999, r_max=0.9999, max_phase=0.314),
}


def get_config(argument: str | None = None):
  fields = dict(patch_size=int, width=int, depth=int, states=int, r_min=float, r_max=float, max_phase=float, pool=str)
  c, task, _ = common.start(
    argument, TASKS, VARIANTS, digits="digits", per_task=SIZES, dropout=float, drop_path=float, activation=str,
    norm=str, **fields,
  )  # fmt: skip
  c.model.implementation = common.optional(str)  # of the recurrence; None for the best that can serve
  if task.startswith("digits"):
    return c
  common.as_pixels(c)
  if common.lra(task):
    common.lra_recipe(c, task)
  else:
    c.train.batch_size = 64
    c.train.epochs = 180.0
    c.optim.learning_rate = 1e-3
    c.optim.weight_decay = 0.05
    c.optim.schedule.final_rate = 1e-7
  c.optim.recurrence_rate = 0.5
  c.optim.clip_norm = 0.0
  return c

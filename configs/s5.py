"""S5 (Smith, Warrington & Linderman 2023): diagonal state space layers by a parallel scan.

  python -m lra_jax.main --config configs/s5.py:digits
  python -m lra_jax.main --config configs/s5.py                    LRA Image as one real channel; the paper reports
  88.00 python -m lra_jax.main --config configs/s5.py:cifar10_sequence

Recipe of run_lra_cifar.sh: 250 epochs at batch 50, AdamW 4.5e-3 with decay 0.07, 1e-3 without decay for eigenvalues
and steps, one epoch warm-up, cosine. Decay spares biases and norms here; there it does not.
"""

from configs import common

TASKS = common.tasks_with("lra_image_real")
VARIANTS = {"base": "s5", "digits": "s5_digits"}


def get_config(argument: str | None = None):
  fields = dict(patch_size=int, width=int, depth=int, states=int, ssm_blocks=int, bidirectional=bool, pool=str)
  c, task = common.start(
    argument, TASKS, VARIANTS, digits="digits", dropout=float, drop_path=float, activation=str, norm=str, **fields
  )
  c.model.implementation = common.optional(str)  # of the recurrence; None for the best that can serve
  if not task.startswith("digits"):
    c.train.batch_size = 50
    c.train.epochs = 250.0
    c.optim.learning_rate = 4.5e-3
    c.optim.weight_decay = 0.07
    c.optim.recurrence_rate = 1e-3 / 4.5e-3
    c.optim.schedule.warmup_epochs = 1.0
    c.optim.schedule.final_rate = 0.0
    c.optim.clip_norm = 0.0
  return c

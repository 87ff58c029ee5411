"""S5 (Smith, Warrington & Linderman 2023): diagonal state space layers by a parallel scan.

  python -m lra_jax.main --config configs/s5.py:digits
  python -m lra_jax.main --config configs/s5.py                   LRA Image as one real channel; 88.00 is published
  python -m lra_jax.main --config configs/s5.py:listops           62.15
  python -m lra_jax.main --config configs/s5.py:text              89.31
  python -m lra_jax.main --config configs/s5.py:retrieval         91.40
  python -m lra_jax.main --config configs/s5.py:pathfinder_real   95.33
  python -m lra_jax.main --config configs/s5.py:path_x_real       98.58
  python -m lra_jax.main --config configs/s5.py:cifar10_sequence

Recipes of run_lra_*.sh, task by task: sizes, how C and Δ start, AdamW, a rate of their own and no decay for eigenvalues
and steps Δ (on some tasks for B too, and Δ at the general rate), a warm-up of one epoch or none, cosine. These are not
the benchmark's budgets, and on Image, Pathfinder and Path-X not its sizes (docs/lra.md): free-for-all. Decay spares
biases and norms here; there it does not. Other sequences and pictures get the recipe of LRA Image.
"""

from configs import common

TASKS = common.tasks_with("lra_image_real")
VARIANTS = {"base": "s5", "digits": "s5_digits"}
_TRUNCATED = "trunc_standard_normal"
SIZES = {  # clip_eigs of LRA Image alone
  "listops": dict(width=128, depth=8, states=16, ssm_blocks=8, activation="half_glu2", dropout=0.0),
  "text": dict(width=256, states=192, ssm_blocks=12, activation="half_glu2"),
  "retrieval": dict(width=128, states=256, ssm_blocks=16, dropout=0.0, c_init=_TRUNCATED),
  "pathfinder": dict(width=192, states=256, ssm_blocks=8, dropout=0.05, norm_momentum=0.9, c_init=_TRUNCATED),
  "path_x": dict(
    width=128, states=256, ssm_blocks=16, dropout=0.0, norm_momentum=0.9, c_init="complex_normal", step_min=1e-4
  ),
}
_EIGENVALUES, _B = ("lambda_re", "lambda_im"), ("w_b_re", "w_b_im")
RECIPES = {  # epochs, batch, warm-up epochs, decay, rate, that of the recurrence, what this is for, undecayed
  "listops": (40.0, 50, 1.0, 0.04, 3e-3, 1e-3, (), ()),
  "text": (35.0, 50, 0.0, 0.07, 4e-3, 1e-3, (*_EIGENVALUES, *_B), _B),
  "retrieval": (20.0, 32, 1.0, 0.05, 2e-3, 1e-3, (*_EIGENVALUES, *_B), _B),
  "lra_image": (250.0, 50, 1.0, 0.07, 4.5e-3, 1e-3, (), ()),
  "pathfinder": (200.0, 64, 1.0, 0.03, 4.5e-3, 9e-4, (*_EIGENVALUES, "log_step", *_B), _B),
  "path_x": (75.0, 32, 1.0, 0.06, 1.8e-3, 6e-4, (*_EIGENVALUES, "log_step", *_B), ()),
}


def get_config(argument: str | None = None):
  fields = dict(patch_size=int, width=int, depth=int, states=int, ssm_blocks=int, bidirectional=bool, pool=str)
  more = dict(clip_eigenvalues=bool, c_init=str, step_min=float, norm_momentum=float)
  c, task, _ = common.start(
    argument, TASKS, VARIANTS, digits="digits", per_task=SIZES, dropout=float, drop_path=float, activation=str,
    norm=str, **fields, **more,
  )  # fmt: skip
  c.model.implementation = common.optional(str)  # of the recurrence; None for the best that can serve
  if task.startswith("digits"):
    return c
  common.as_pixels(c)
  name = common.lra(task) or "lra_image"
  if common.lra(task):
    c.eval.batch_size = common.LRA[name].eval_batch_size
    c.model.clip_eigenvalues = name == "lra_image"
  epochs, batch_size, warmup, decay, rate, slow_rate, recurrence, no_decay = RECIPES[name]
  c.train.batch_size = batch_size
  c.train.epochs = epochs
  c.optim.learning_rate = rate
  c.optim.weight_decay = decay
  c.optim.recurrence_rate = slow_rate / rate
  c.optim.recurrence = recurrence
  c.optim.no_decay = no_decay
  c.optim.schedule.warmup_epochs = warmup
  c.optim.schedule.final_rate = 0.0
  c.optim.clip_norm = 0.0
  return c

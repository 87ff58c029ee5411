"""Nyströmformer (Xiong et al. 2021): attention through landmarks.

  python -m lra_jax.main --config configs/nystromformer.py:digits
  python -m lra_jax.main --config configs/nystromformer.py                             LRA Image; the paper reports
  41.58 python -m lra_jax.main --config configs/nystromformer.py:cifar10,variant=tiny32      patches of 2 × 2

Recipe of the official LRA code (lra_config.py): AdamW 1e-4 without decay, epsilon 1e-6, batch 256, 35,000 steps, 175
of them warm-up, linear decay, evaluation every 175 steps. PyTorch's OneCycle also moves β₁ there; here it stays 0.9.
Black pixels are masked in the official runs, and the pseudo-inverse starts from a value of the whole batch; neither is
done here (`--config.model.pinv_init=global` does the latter).
"""

from configs import common

TASKS = common.tasks_with("lra_image")
VARIANTS = {name: f"nystromformer_{name}" for name in ("lra", "bert", "tiny32", "digits")}


def get_config(argument: str | None = None):
  fields = dict(patch_size=int, width=int, depth=int, heads=int, mlp_hidden=int, landmarks=int, skip_kernel=int)
  c, task = common.start(argument, TASKS, VARIANTS, digits="digits", dropout=float, drop_path=float, **fields)
  c.model.pinv_iterations = 6
  c.model.pinv_init = "per_matrix"  # or "global"
  if task == "cifar10":
    common.small_image_recipe(c)
  elif not task.startswith("digits"):
    c.train.batch_size = 256
    c.train.steps = 35_000
    c.optim.learning_rate = 1e-4
    c.optim.weight_decay = 0.0
    c.optim.eps = 1e-6
    c.optim.schedule.name = "linear"
    c.optim.schedule.shares = (0.0, 0.005, 1.0)
    c.optim.schedule.factors = (1 / 25, 1.0, 1 / 25e4)
  return c

"""The Transformer baseline of the Long Range Arena (Tay et al. 2021).

  python -m lra_jax.main --config configs/lra_transformer.py:digits
  python -m lra_jax.main --config configs/lra_transformer.py                       LRA Image; 42.44 is published

Recipe of its Image task: Adam 5e-4 with β₂ 0.98 and epsilon 1e-9, 175 steps warm-up and cosine over 35,000 steps,
batch 256. Black pixels are masked in the published runs, not here.
"""

from configs import common

TASKS = common.tasks_with("lra_image")
VARIANTS = {"base": "lra_transformer", "digits": "lra_transformer_digits"}


def get_config(argument: str | None = None):
  fields = dict(patch_size=int, width=int, depth=int, heads=int, qkv_features=int, mlp_hidden=int, pool=str)
  c, task = common.start(
    argument, TASKS, VARIANTS, digits="digits", dropout=float, attention_dropout=float, position=str, **fields
  )
  if task.startswith("digits"):
    common.attention_digits_recipe(c)
  else:
    c.train.batch_size = 256
    c.train.steps = 35_000
    c.optim.name = "adam"
    c.optim.learning_rate = 5e-4
    c.optim.weight_decay = 0.0
    c.optim.b2 = 0.98
    c.optim.eps = 1e-9
    c.optim.schedule.warmup_epochs = 175 * 256 / 45_000
    c.optim.schedule.final_rate = 0.0
    c.optim.clip_norm = 0.0
  return c

"""The Transformer baseline of the Long Range Arena (Tay et al. 2021).

  python -m lra_jax.main --config configs/lra_transformer.py:digits
  python -m lra_jax.main --config configs/lra_transformer.py                       LRA Image; 42.44 is published
  python -m lra_jax.main --config configs/lra_transformer.py:listops               36.37
  python -m lra_jax.main --config configs/lra_transformer.py:text                  64.27
  python -m lra_jax.main --config configs/lra_transformer.py:retrieval             57.46
  python -m lra_jax.main --config configs/lra_transformer.py:pathfinder            71.40
  python -m lra_jax.main --config configs/lra_transformer.py:path_x                not above chance

Sizes, budget, optimizer and schedule are those of google-research/long-range-arena (transformer_base.py and what it
builds on): Adam with β₂ 0.98 and epsilon 1e-9, decay 0.1 apart from the gradient on texts; 0.05 / √steps after a linear
warm-up on texts (Retrieval ends within it), cosine on pixels. Texts have 4,096 bytes here as in the paper's table, in
the published config 1,000: `--config.task.length=1000`. Black pixels are masked in the published runs, not here
(`--config.task.quirks="('mask_zeros',)"`); decay spares embeddings, biases and norms here, there it does not.

Attention of all 16,384 pixels of Path-X to all needs memory: a batch of 64 is worked off in 32 parts
(`--config.train.accumulate`; on several devices in fewer).
"""

from configs import common

TASKS = common.tasks_with("lra_image")
VARIANTS = {"base": "lra_transformer", "digits": "lra_transformer_digits"}
_TEXT = dict(dropout=0.1, attention_dropout=0.1, pool="cls", position="sinusoidal")
_PATH = dict(width=32, qkv_features=16, mlp_hidden=32, pool="mean")
SIZES = {
  "listops": dict(width=512, depth=4, heads=8, qkv_features=512, mlp_hidden=1024, **_TEXT),
  "text": dict(width=256, depth=4, heads=4, qkv_features=256, mlp_hidden=1024, **_TEXT),
  "retrieval": dict(width=128, depth=4, heads=4, qkv_features=128, mlp_hidden=512, **_TEXT),
  "pathfinder": dict(depth=4, heads=4, dropout=0.2, attention_dropout=0.1, position="sinusoidal", **_PATH),
  "path_x": dict(depth=1, heads=2, dropout=0.1, attention_dropout=0.1, position="learned", **_PATH),
}  # those of LRA Image are the preset's


def get_config(argument: str | None = None):
  fields = dict(patch_size=int, width=int, depth=int, heads=int, qkv_features=int, mlp_hidden=int, pool=str)
  c, task, _ = common.start(
    argument, TASKS, VARIANTS, digits="digits", per_task=SIZES, dropout=float, attention_dropout=float, position=str,
    **fields,
  )  # fmt: skip
  if task.startswith("digits"):
    common.attention_digits_recipe(c)
    return c
  common.as_pixels(c)
  c.optim.b2 = 0.98
  c.optim.eps = 1e-9
  c.optim.clip_norm = 1.0 if common.lra(task) == "path_x" else 0.0
  if task in common.TEXT_TASKS:
    budget = common.LRA[task]
    common.lra_budget(c, task)
    c.optim.learning_rate = 0.05 / budget.warmup**0.5
    c.optim.weight_decay = 0.1
    c.optim.schedule.name = "rsqrt"
    c.optim.schedule.warmup_rate = 0.0
    c.optim.schedule.warmup_epochs = common.lra_epochs(task, budget.batch_size, budget.warmup)
    return c
  # Cosine to zero on pixels; on other images and sequences as on LRA Image.
  name = common.lra(task) or "lra_image"
  budget = common.LRA[name]
  common.lra_budget(c, name)
  c.optim.name = "adam"
  c.optim.learning_rate = 5e-4 if name == "lra_image" else 1e-3
  c.optim.weight_decay = 0.0
  c.optim.schedule.warmup_rate = 0.0
  c.optim.schedule.warmup_epochs = common.lra_epochs(name, budget.batch_size, budget.warmup)
  c.optim.schedule.final_rate = 0.0
  if name == "path_x":
    c.train.accumulate = 32
  return c

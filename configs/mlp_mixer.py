"""MLP-Mixer (Tolstikhin et al. 2021).

  python -m lra_jax.main --config configs/mlp_mixer.py:digits
  python -m lra_jax.main --config configs/mlp_mixer.py                              CIFAR-10, our preset for 32 px
  python -m lra_jax.main --config configs/mlp_mixer.py:cifar10,variant=s16 --config.model.patch_size=4

big_vision trains B/16 on ImageNet for 300 epochs at batch 4096 (Adam 1e-3, decay 1e-4, clipping at 1, 10,000 steps
warm-up, linear decay, MixUp 0.5, stochastic depth 0.1); for CIFAR-10 `configs.common.small_image_recipe` is ours.
"""

from configs import common

TASKS = (*common.IMAGE_TASKS, *common.SEQUENCE_TASKS, *common.TEXT_TASKS)
VARIANTS = {name: f"mlp_mixer_{name}" for name in ("tiny32", "s16", "s32", "b16", "b32", "l16", "digits")}


def get_config(argument: str | None = None):
  fields = dict(patch_size=int, width=int, depth=int, token_hidden=int, channel_hidden=int)
  c, task = common.start(argument, TASKS, VARIANTS, digits="digits", dropout=float, drop_path=float, **fields)
  if not task.startswith("digits"):
    common.small_image_recipe(c)
    c.model.drop_path = 0.1
  return c

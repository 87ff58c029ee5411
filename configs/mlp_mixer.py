"""MLP-Mixer (Tolstikhin et al. 2021).

  python -m lra_jax.main --config configs/mlp_mixer.py:digits
  python -m lra_jax.main --config configs/mlp_mixer.py                              CIFAR-10, our preset for 32 px
  python -m lra_jax.main --config configs/mlp_mixer.py:cifar10,variant=s16 --config.model.patch_size=4
  python -m lra_jax.main --config configs/mlp_mixer.py:cifar100,recipe=keras        the Keras example; about 52 there
  python -m lra_jax.main --config configs/mlp_mixer.py:imagenette                   also :tiny_imagenet, :folder:PATH …
  python -m lra_jax.main --config configs/mlp_mixer.py:listops                      and the rest of the Long Range Arena

big_vision trains B/16 on ImageNet for 300 epochs at batch 4096 (Adam 1e-3, decay 1e-4, clipping at 1, 10,000 steps
warm-up, linear decay, MixUp 0.5, stochastic depth 0.1). Here all pictures get `configs.common.image_recipe`, and the
Long Range Arena `configs.common.lra_recipe` with sizes of ours (docs/lra.md). The Keras example has its dropout after
both MLPs and before the head, here it is of their hidden units; and it has no LayerNorm before the mean.
"""

from configs import common

TASKS = (*common.IMAGE_TASKS, *common.SEQUENCE_TASKS, *common.TEXT_TASKS)
VARIANTS = {name: f"mlp_mixer_{name}" for name in ("tiny32", "s16", "s32", "b16", "b32", "l16", "digits")}
SIZES = {
  **{key: {"variant": "s16"} for key in common.LARGE_IMAGE_TASKS},
  "tiny_imagenet": {"patch_size": 8},
  "listops": dict(width=256, depth=4, token_hidden=128, channel_hidden=1024),
  "text": dict(width=256, depth=4, token_hidden=64, channel_hidden=512),
  "retrieval": dict(width=128, depth=4, token_hidden=16, channel_hidden=256),
  "lra_image": dict(width=64, depth=3, token_hidden=32, channel_hidden=128),
  "pathfinder": dict(width=64, depth=3, token_hidden=32, channel_hidden=128),
  "path_x": dict(width=64, depth=3, token_hidden=32, channel_hidden=128),
}


def get_config(argument: str | None = None):
  fields = dict(patch_size=int, width=int, depth=int, token_hidden=int, channel_hidden=int)
  c, task, recipe = common.start(
    argument, TASKS, VARIANTS, digits="digits", per_task=SIZES, recipes=("keras",), dropout=float, drop_path=float,
    **fields,
  )  # fmt: skip
  if recipe:
    common.keras_recipe(c)
    c.model.token_hidden = c.model.channel_hidden = 64  # the number of patches
    c.model.dropout = 0.2
  elif common.lra(task):
    common.lra_recipe(c, task)
  elif not task.startswith("digits"):
    common.image_recipe(c)
    c.model.drop_path = 0.1
  return c

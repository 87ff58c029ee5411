"""Sequencer2D (Tatsunami & Taki 2022): BiLSTMs along rows and columns.

  python -m lra_jax.main --config configs/sequencer2d.py:digits             98 % and more in a minute on 2 CPU cores
  python -m lra_jax.main --config configs/sequencer2d.py                    CIFAR-10, our preset for 32 px
  python -m lra_jax.main --config configs/sequencer2d.py:cifar10,variant=s  the paper's S (4 × 4 tokens at 32 px)
  python -m lra_jax.main --config configs/sequencer2d.py:imagenet2012       S; also :imagenette, :folder:PATH …
  python -m lra_jax.main --config configs/sequencer2d.py:tiny_imagenet      our preset for 64 px, or ,variant=xs
  python -m lra_jax.main --config configs/sequencer2d.py:cifar10,variant=xs,recipe=imagenet

Large pictures, and small ones with `recipe=imagenet`, get the recipe of the paper's ImageNet training
(`configs.common.imagenet_recipe`). CIFAR-10 and the like get it scaled down (`configs.common.small_image_recipe`):
fewer epochs, pad-and-crop instead of random resized crop, no RandAugment. Measured accuracies are in docs/results.md.
"""

from configs import common

VARIANTS = ("small32", "tiny32", "small64", "digits", "xs", "s", "m", "l")


def get_config(argument: str | None = None):
  large = {key: {"variant": "s"} for key in common.LARGE_IMAGE_TASKS} | {"tiny_imagenet": {"variant": "small64"}}
  return build("sequencer2d", argument, VARIANTS, large)


def build(family, argument, variants, large):
  """The config of one of both Sequencers; `large` has the models of tasks of large pictures."""
  names = {variant: f"{family}_{variant}" for variant in variants}
  fields = dict(drop_path=float, depths=tuple, patch_sizes=tuple, embed_dims=tuple, hidden_sizes=tuple)
  c, task, recipe = common.start(
    argument, common.IMAGE_TASKS, names, digits="digits", per_task=large, recipes=("imagenet",), **fields
  )
  c.model.unroll = 1  # LSTM steps in one iteration of the loop; 1 is the fastest on CPU (docs/results.md)
  c.model.implementation = common.optional(str)  # of the LSTM: "xla" or "reference"; None for the best that can serve
  if recipe:
    common.imagenet_recipe(c)
  elif not task.startswith("digits"):
    common.image_recipe(c)
  return c

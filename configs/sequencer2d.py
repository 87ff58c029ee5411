"""Sequencer2D (Tatsunami & Taki 2022): BiLSTMs along rows and columns.

  python -m lra_jax.main --config configs/sequencer2d.py:digits             98 % and more in a minute on 2 CPU cores
  python -m lra_jax.main --config configs/sequencer2d.py                    CIFAR-10, our preset for 32 px
  python -m lra_jax.main --config configs/sequencer2d.py:cifar10,variant=s  the paper's S (4 × 4 tokens at 32 px)

Recipe of the paper's ImageNet training (AdamW 2e-3 at batch 2048, weight decay 0.05, 20 of 300 epochs warm-up from
1e-6, cosine, label smoothing 0.1, MixUp 0.8, CutMix 1.0, random erasing 0.25 pixel), scaled to CIFAR-10: fewer epochs,
pad-and-crop instead of random resized crop, clipping at 1 as in its CIFAR transfer. RandAugment is missing here.
Measured accuracies are in docs/results.md.
"""

from configs import common

VARIANTS = ("small32", "tiny32", "small64", "digits", "xs", "s", "m", "l")


def get_config(argument: str | None = None):
  return build("sequencer2d", argument, VARIANTS, {"cifar10": "small32", "digits": "digits"})


def build(family, argument, variants, defaults):
  """The config of one of both Sequencers; `defaults` has the variant of every task."""
  names = {variant: f"{family}_{variant}" for variant in variants}
  fields = dict(drop_path=float, depths=tuple, patch_sizes=tuple, embed_dims=tuple, hidden_sizes=tuple)
  c, task = common.start(argument, common.IMAGE_TASKS, names, digits=defaults["digits"], **fields)
  c.model.unroll = 1  # LSTM steps in one iteration of the loop; 1 is the fastest on CPU (docs/results.md)
  c.model.implementation = common.optional(str)  # of the LSTM: "xla" or "reference"; None for the best that can serve
  if task == "cifar10":
    common.small_image_recipe(c)
  return c

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
  task, options = common.parse(argument, tuple(defaults), variant=variants)
  c = common.base(f"{family}_{options['variant'] or defaults[task]}", task)
  # Of the preset, where None; see lra_jax/models/sequencer.py.
  c.model.drop_path = common.optional(float)
  c.model.depths = common.optional(tuple)
  c.model.patch_sizes = common.optional(tuple)
  c.model.embed_dims = common.optional(tuple)
  c.model.hidden_sizes = common.optional(tuple)
  c.model.unroll = 1  # LSTM steps in one iteration of the loop; 1 is the fastest on CPU (docs/results.md)
  c.model.implementation = common.optional(str)  # of the LSTM: "xla" or "reference"; None for the best that can serve
  c.optim.weight_decay = 0.05
  if task == "digits":
    c.train.batch_size = 64
    c.train.epochs = 60.0
    c.train.label_smoothing = 0.1
    c.train.cutmix = 1.0
    c.train.mix_probability = 0.5
    c.augment.crop_pad = 1
    c.optim.learning_rate = 2e-3
    c.optim.schedule.warmup_epochs = 2.0
    c.optim.ema_decay = 0.99
    c.eval.every_epochs = 2.0
  if task == "cifar10":
    c.train.batch_size = 256
    c.train.epochs = 200.0
    c.train.label_smoothing = 0.1
    c.train.mixup = 0.8
    c.train.cutmix = 1.0
    c.augment.crop_pad = 4
    c.augment.flip = True
    c.augment.erase_probability = 0.25
    c.optim.learning_rate = 1e-3
    c.optim.schedule.warmup_epochs = 10.0
    c.optim.schedule.cooldown_epochs = 5.0
    c.optim.ema_decay = 0.9998
    c.eval.batch_size = 1000
  return c

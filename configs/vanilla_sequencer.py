"""VanillaSequencer (Tatsunami & Taki 2022, section 4): one BiLSTM over the tokens in raster order.

  python -m lra_jax.main --config configs/vanilla_sequencer.py:digits
  python -m lra_jax.main --config configs/vanilla_sequencer.py                          CIFAR-10, our preset for 32 px
  python -m lra_jax.main --config configs/vanilla_sequencer.py:cifar10,variant=s_pe
  python -m lra_jax.main --config configs/vanilla_sequencer.py:imagenette               S; also :tiny_imagenet …

Recipe as in configs/sequencer2d.py.
"""

from configs import common, sequencer2d

VARIANTS = ("tiny32", "digits", "s", "s_h", "s_pe")


def get_config(argument: str | None = None):
  large = {key: {"variant": "s"} for key in common.LARGE_IMAGE_TASKS} | {"tiny_imagenet": {"patch_sizes": (4,)}}
  return sequencer2d.build("vanilla_sequencer", argument, VARIANTS, large)

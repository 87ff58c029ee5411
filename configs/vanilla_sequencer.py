"""VanillaSequencer (Tatsunami & Taki 2022, section 4): one BiLSTM over the tokens in raster order.

  python -m lra_jax.main --config configs/vanilla_sequencer.py:digits
  python -m lra_jax.main --config configs/vanilla_sequencer.py:cifar10,variant=s_pe

Recipe as in configs/sequencer2d.py.
"""

from configs import sequencer2d

VARIANTS = ("tiny32", "digits", "s", "s_h", "s_pe")


def get_config(argument: str | None = None):
  return sequencer2d.build("vanilla_sequencer", argument, VARIANTS, {"cifar10": "tiny32", "digits": "digits"})

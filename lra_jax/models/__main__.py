"""Prints the table of models, as it stands in README: `python -m lra_jax.models`."""

import sys
from typing import NamedTuple

from flax import nnx

from lra_jax import errors, models

IMAGENET = ((224, 224, 3), 1000, None)
CIFAR = ((32, 32, 3), 10, None)
DIGITS = ((8, 8, 1), 10, None)
PIXELS = ((1024, 3), 10, None)
GREY = ((1024, 1), 10, None)
TOKENS = ((1024,), 10, 256)
TEXT = ((512,), 2, 32_000)


class Family(NamedTuple):
  """A row: its models, and the input (shape, classes, vocabulary) that each one's parameters are counted at."""

  title: str
  paper: str
  config: str
  inputs: dict[str, tuple]
  checked: str


def _with(prefix, **groups):
  """{"vit_ti16": IMAGENET, ...} of _with("vit_", imagenet=("ti16", ...), ...)."""
  known = dict(imagenet=IMAGENET, cifar=CIFAR, digits=DIGITS, pixels=PIXELS, grey=GREY, tokens=TOKENS, text=TEXT)
  return {prefix + name: known[group] for group, names in groups.items() for name in names}


TIMM = "counts; timm: outputs, gradients, weights both ways"
ORACLE = "counts; NumPy float64 from the equations: outputs, gradients"
FAMILIES = (
  Family(
    "Sequencer2D",
    "2205.01972",
    "sequencer2d",
    _with("sequencer2d_", imagenet=("xs", "s", "m", "l"), cifar=("small32", "small64", "tiny32"), digits=("digits",)),
    TIMM,
  ),
  Family(
    "VanillaSequencer",
    "2205.01972",
    "vanilla_sequencer",
    _with("vanilla_sequencer_", imagenet=("s", "s_h", "s_pe"), cifar=("tiny32",), digits=("digits",)),
    "counts; torch.nn: outputs",
  ),
  Family("TrellisNet", "1810.06682", "trellisnet", _with("trellisnet", pixels=("",), digits=("_digits",)), ORACLE),
  Family(
    "LipschitzRNN",
    "2006.12070",
    "lipschitz_rnn",
    _with("lipschitz_rnn", pixels=("", "_256"), digits=("_digits",)),
    ORACLE,
  ),
  Family(
    "Vision Transformer",
    "2010.11929",
    "vit",
    _with("vit_", imagenet=("ti16", "s16", "s32", "b16"), cifar=("tiny32",), digits=("digits",)),
    TIMM,
  ),
  Family(
    "PiT, Pixel Transformer", "2406.09415", "pit", _with("pit_", cifar=("ti", "s", "b"), digits=("digits",)), TIMM
  ),
  Family(
    "Nyströmformer",
    "2102.03902",
    "nystromformer",
    _with("nystromformer_", tokens=("lra",), text=("bert",), cifar=("tiny32",), digits=("digits",)),
    "counts; transformers: outputs, gradients, weights both ways",
  ),
  Family(
    "FNet",
    "2105.03824",
    "fnet",
    _with("fnet_", text=("base", "large"), tokens=("small",), digits=("digits",)),
    "counts; transformers: outputs, gradients, weights both ways",
  ),
  Family(
    "MLP-Mixer",
    "2105.01601",
    "mlp_mixer",
    _with("mlp_mixer_", imagenet=("s16", "s32", "b16", "b32", "l16"), cifar=("tiny32",), digits=("digits",)),
    TIMM,
  ),
  Family(
    "gMLP",
    "2105.08050",
    "gmlp",
    _with("gmlp_", imagenet=("ti16", "s16", "b16"), cifar=("tiny32",), digits=("digits",)),
    TIMM,
  ),
  Family(
    "ConvMixer",
    "2201.09792",
    "convmixer",
    _with("convmixer_", cifar=("256_8", "256_12"), imagenet=("768_32", "1024_20", "1536_20"), digits=("digits",)),
    TIMM,
  ),
  Family(
    "ResNet-18",
    "1512.03385",
    "resnet",
    _with("resnet", imagenet=("18",), cifar=("18_cifar",), digits=("_digits",)),
    TIMM,
  ),
  Family(
    "LRA Transformer",
    "2011.04006",
    "lra_transformer",
    _with("lra_transformer", tokens=("",), digits=("_digits",)),
    "counts; NumPy float64 from the equations: outputs",
  ),
  Family("S5", "2208.04933", "s5", _with("s5", grey=("",), digits=("_digits",)), ORACLE),
  Family("LRU", "2303.06349", "lru", _with("lru", pixels=("", "_large"), digits=("_digits",)), ORACLE),
)


def table() -> str:
  """The table in Markdown, one row a family."""
  lines = ["| model | config | names and parameters | checked against |", "|---|---|---|---|"]
  for family in FAMILIES:
    names = []
    for name, (shape, classes, vocab_size) in family.inputs.items():
      make = lambda name=name, shape=shape, classes=classes, vocab_size=vocab_size: models.create(
        name, input_shape=shape, num_classes=classes, vocab_size=vocab_size, rngs=nnx.Rngs(0)
      )
      count = models.count_params(nnx.eval_shape(make))
      names.append(f"`{name}` {count / 1e6:.2f} M" if count >= 1e6 else f"`{name}` {count / 1e3:.0f} k")
    lines.append(
      f"| [{family.title}](https://arxiv.org/abs/{family.paper}) | [{family.config}](configs/{family.config}.py) "
      f"| {', '.join(names)} | {family.checked} |"
    )
  return "\n".join(lines)


def main() -> None:
  """Parses the (empty) command line and prints."""
  errors.parse_flags(sys.argv, required=())
  print(table())


if __name__ == "__main__":
  errors.exit_on_user_error(main)

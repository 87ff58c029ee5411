"""Files of pictures as arrays: JPEG, PNG and WebP, decoded and brought to one size by Pillow."""

import io
import os

import numpy as np

from lra_jax import errors

_FORMATS = ("JPEG", "PNG", "WEBP")  # no others: each of Pillow's decoders is a way in for a hostile file


class PictureError(errors.UserError):
  """A picture that cannot be decoded; the text is one line and starts with where it is."""


def decode(content: bytes, where: str, channels: int = 3) -> np.ndarray:
  """Decodes one picture; of an animation the first frame.

  Pixels come out upright, as the EXIF orientation says. Transparency is laid on black, palettes are resolved. CMYK is
  converted by Pillow without a colour profile. Of 16 bits the upper 8 count, in grey as in colour, which is what
  Pillow and libpng do with colour (Pillow alone clips grey). Colour becomes grey by ITU-R BT.601 luma.

  Args:
    content: the whole file, JPEG, PNG or WebP.
    where: the file, for the error.
    channels: C, 3 for RGB, 1 for grey.

  Returns:
    (H, W, C) uint8.

  Raises:
    PictureError: no bytes, cut off, damaged, another format, or more than twice `PIL.Image.MAX_IMAGE_PIXELS` pixels
      (179 million), which is taken for an attack.
  """
  from PIL import Image, ImageOps

  if channels not in (1, 3):
    raise ValueError(f"channels={channels}, expected 1 or 3")
  if not content:
    raise PictureError(f"{where}: file of zero bytes; expected a JPEG, PNG or WebP picture: replace or remove it")
  try:
    with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
      image.load()
      ImageOps.exif_transpose(image, in_place=True)
      if image.mode.startswith("I"):  # 16 bits; one grey may be transparent
        grey = np.asarray(image)
        grey = np.where(grey == image.info.get("transparency", -1), 0, grey)
        image = Image.fromarray((grey >> 8).astype(np.uint8))
      if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
      mode = "L" if channels == 1 else "RGB"
      if image.mode != mode:  # else it would be copied
        image = image.convert(mode)
      return np.asarray(image).reshape(image.height, image.width, channels)
  except MemoryError:
    raise
  except Exception as error:  # Pillow's decoders raise a dozen types
    raise PictureError(
      f"{where}: cannot be decoded ({_reason(error)}); expected a whole JPEG, PNG or WebP picture: replace or remove it"
    ) from error


def read(path: str | os.PathLike, channels: int = 3) -> np.ndarray:
  """Decodes the picture in a file; arguments, result and errors as of `decode`, also where it cannot be opened."""
  try:
    with open(path, "rb") as file:
      content = file.read()
  except OSError as error:
    raise PictureError(f"{path}: cannot be read ({error.strerror}); make it readable, or remove it") from error
  return decode(content, os.fspath(path), channels)


def _reason(error):
  from PIL import Image, UnidentifiedImageError

  if isinstance(error, UnidentifiedImageError):  # its own text shows the address of a buffer
    return "damaged, or no picture of these formats"
  if isinstance(error, Image.DecompressionBombError):
    return " ".join(str(error).split())
  return errors.first_line(error)


def resize_and_crop(image: np.ndarray, size: int) -> np.ndarray:
  """The largest centred square, brought to size × size by Pillow's bicubic filter, widened where it shrinks.

  The same as resizing the shorter side to `size` and cutting the longer one to the middle, but for rounding: the
  square's place is not rounded to whole pixels, and a picture of any aspect needs no more memory than its own.

  Args:
    image: (H, W, C) uint8, C 1 or 3.
    size: of the result, in pixels.

  Returns:
    (size, size, C) uint8; the image itself where it has that size.
  """
  from PIL import Image

  height, width, channels = image.shape
  if height == width == size:
    return image
  side = min(height, width)
  left, top = (width - side) / 2, (height - side) / 2
  picture = Image.fromarray(image[..., 0] if channels == 1 else image)
  picture = picture.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
  return np.asarray(picture).reshape(size, size, channels)

"""From a file to an upright RGB image, or to `BadImage`: no other outcome, no hang, no warning.

What is decided here: transparent pixels are laid on white, as a viewer shows them; 16-bit grey is scaled to 8 bits;
floating point is read as 0 to 1; colour profiles are ignored; of an animation the first frame counts.
"""

from __future__ import annotations

import logging
import os
import stat
import sys
import threading
import warnings
from collections.abc import Callable
from io import BytesIO
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from vitcli.data.jpeg import is_whole, upper_rows, usual_frame
from vitcli.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
EXTENSIONS = frozenset({".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
MAX_PIXELS = 64_000_000
MAX_ASPECT = 100

Box = tuple[int, int, int, int]  # left, top, right, bottom
Window = Callable[[int, int], Box]  # what is wanted of an image of a height and a width

# EXIF's orientation, and what turns such an image upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION = 0x0112
_TILE_WIDTH, _TILE_HEIGHT = 322, 323

logging.getLogger("PIL").addHandler(logging.NullHandler())  # what it logs, BadImage says


class BadImage(DataError):  # noqa: N818 (it names the image, too)
    """An image that cannot be used: `path` says which, `reason` why."""

    def __init__(self, path: str, reason: str, hint: str = ""):
        super().__init__(f"{_printable(path)}: {_printable(reason)}", hint)
        self.path, self.reason = path, reason

    def __reduce__(self) -> tuple[type[BadImage], tuple[str, str, str]]:
        return BadImage, (self.path, self.reason, self.hint)


def decode(source: str | os.PathLike[str] | bytes, name: str = "image") -> Image.Image:
    """The image of a file, or of a file's bytes, which `name` then stands for in messages.

    Size and shape are checked before any pixel is decoded. Raises BadImage.
    """
    if isinstance(source, bytes):
        return _decode(BytesIO(source), name)
    path = os.fspath(source)
    with _open(path) as file:
        return _decode(file, path)


def whole(height: int, width: int) -> Box:
    """The `Window` that is all of an image."""
    return 0, 0, width, height


def decode_pixels(data: bytes, name: str, window: Window = whole) -> Tensor:
    """What `decode` gives, as uint8 (3, h, w), or what of it lies in a window, which is asked once. Raises BadImage.

    torchvision decodes a JPEG to the same levels in less time, where nothing is left to decide: it is RGB, upright and
    not cut short. Below the window it is not decoded if messages of decoders go nowhere (`hush_decoders`).
    """
    from vitcli.data.preprocess import pixels

    frame = usual_frame(data)
    box = window(frame.height, frame.width) if frame else None
    image = None
    if frame or _is_common_jpeg(data, name):
        from vitcli.data.decoder import by_torchvision

        image = by_torchvision(upper_rows(data, frame, box[3]) if frame and box and _hushed else bytearray(data))
    if image is None:
        image = pixels(_decode(BytesIO(data), name))
    return cut(image, box or window(*image.shape[1:]))


def cut(image: Tensor, box: Box) -> Tensor:
    """What of an image (3, h, w) lies in a box."""
    left, top, right, bottom = box
    return image[:, top:bottom, left:right]


def hush_decoders() -> None:
    """From now on what is not Python's own goes nowhere on stderr, be it a library's last words."""
    global _hushed
    if not _hushed:
        sys.stderr = os.fdopen(os.dup(2), "w", buffering=1, errors="backslashreplace")
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 2)
        os.close(nowhere)
        _hushed = True


_hushed = False


def _is_common_jpeg(data: bytes, name: str) -> bool:
    """Whether PIL says of a JPEG that is not cut short that it is RGB and upright."""
    if not is_whole(data):
        return False
    try:
        with quiet, Image.open(BytesIO(data), formats=("JPEG",)) as image:
            _check_size(image, name)
            return (image.format, image.mode) == ("JPEG", "RGB") and image.getexif().get(_ORIENTATION, 1) == 1
    except BadImage:
        raise
    except Exception:  # `_decode` says what
        return False


def read(path: str) -> bytes:
    """The bytes of a regular file that is not empty. Raises BadImage."""
    with _open(path) as file:
        try:
            return file.read()
        except OSError as error:
            raise BadImage(path, error.strerror or str(error)) from None


def _open(path: str) -> BinaryIO:
    """A regular file that is not empty; a pipe without a writer does not block."""
    try:
        file = os.fdopen(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)), "rb")
    except IsADirectoryError:
        raise BadImage(path, "not a regular file") from None
    except (OSError, ValueError) as error:
        raise BadImage(path, getattr(error, "strerror", None) or str(error)) from None
    status = os.fstat(file.fileno())
    if stat.S_ISREG(status.st_mode) and status.st_size:
        return file
    file.close()
    raise BadImage(path, "empty file" if stat.S_ISREG(status.st_mode) else "not a regular file")


def _decode(file: BinaryIO, name: str) -> Image.Image:
    try:
        with quiet, Image.open(file, formats=FORMATS) as image:
            _check_size(image, name)
            image.load()
            return _upright(_rgb(image, name), image)
    except BadImage:
        raise
    except UnidentifiedImageError:
        raise BadImage(name, f"not an image of {', '.join(FORMATS[:-1])} or {FORMATS[-1]}") from None
    except Image.DecompressionBombError:
        raise BadImage(name, f"more than {MAX_PIXELS // 10**6} megapixels") from None
    except Exception as error:  # a decoder given broken bytes may raise anything
        raise BadImage(name, f"broken image: {error or type(error).__name__}") from None


class _Quiet:
    """No warnings inside. All threads share the filters: the first to enter sets them, the last to leave restores."""

    def __init__(self) -> None:
        self._lock, self._inside = threading.Lock(), 0

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._filters = warnings.catch_warnings(action="ignore")
                self._filters.__enter__()
            self._inside += 1

    def __exit__(self, *error: Any) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._filters.__exit__(*error)


quiet = _Quiet()


def _check_size(image: Image.Image, name: str) -> None:
    width, height = image.size
    if min(width, height) < 1:
        raise BadImage(name, f"no pixels: {width}x{height}")
    tiles = getattr(image, "tag_v2", {})  # a TIFF's tile is decoded as a whole, however small the image
    tile = int(tiles.get(_TILE_WIDTH, 1)) * int(tiles.get(_TILE_HEIGHT, 1))
    if max(width * height, tile) > MAX_PIXELS:
        raise BadImage(name, f"more than {MAX_PIXELS // 10**6} megapixels: {width}x{height}")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise BadImage(name, f"longer than {MAX_ASPECT}:1: {width}x{height}")


def _rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode.startswith("I;16"):
        grey = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((grey * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if image.mode == "I":
        raise BadImage(name, "32-bit integer pixels, whose range is unknown")
    if image.mode == "F":
        grey = np.asarray(image)
        if not (grey.min() >= 0 and grey.max() <= 1):  # NaN is neither
            raise BadImage(name, "floating-point pixels outside 0 to 1")
        return Image.fromarray((grey * 255 + 0.5).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _upright(rgb: Image.Image, image: Image.Image) -> Image.Image:
    """Turn as the image's EXIF says; a broken EXIF says nothing."""
    try:
        turn = _UPRIGHT.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # EXIF is a small TIFF, and as breakable
        turn = None
    return rgb if turn is None else rgb.transpose(turn)


def _printable(text: str) -> str:
    """File names may hold control characters and bytes that are not UTF-8."""
    return text if text.isprintable() else repr(text)[1:-1]

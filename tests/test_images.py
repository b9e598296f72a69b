import io
import os
import struct
import subprocess
import sys
import threading
import time
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from vitcli.data.images import BadImage, decode, decode_pixels
from vitcli.data.jpeg import upper_rows, usual_frame
from vitcli.data.preprocess import pixels
from vitcli.errors import DataError, StorageError

# An image without any symmetry: each corner block has a colour of its own.
PATTERN = np.zeros((6, 10, 3), dtype=np.uint8)
PATTERN[:3, :5], PATTERN[:3, 5:], PATTERN[3:, :5], PATTERN[3:, 5:] = (
    (250, 10, 20),
    (20, 240, 30),
    (5, 60, 230),
    (90, 90, 90),
)


def encode(image, format, **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def rgb(data):
    image = decode(data)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def pixel(data):
    """The one colour of a plain image."""
    colours = np.unique(rgb(data).reshape(-1, 3), axis=0)
    assert len(colours) == 1
    return tuple(colours[0].tolist())


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "WEBP"])
def test_lossless_formats_give_their_pixels(format):
    options = {"lossless": True} if format == "WEBP" else {}
    assert (rgb(encode(Image.fromarray(PATTERN), format, **options)) == PATTERN).all()


def test_progressive_and_plain_jpeg_agree_with_what_was_saved():
    image = Image.new("RGB", (40, 30), (200, 100, 50))
    for progressive in (False, True):
        assert np.abs(rgb(encode(image, "JPEG", quality=100, progressive=progressive)) - (200, 100, 50)).max() <= 1


def test_the_content_decides_not_the_name(tmp_path):
    file = tmp_path / "n02105855_2933.JPEG"
    file.write_bytes(encode(Image.fromarray(PATTERN), "PNG"))
    assert (np.asarray(decode(file)) == PATTERN).all()


@pytest.mark.parametrize("mode", ["1", "L", "P"])
def test_grey_bilevel_and_palette(mode):
    image = Image.fromarray(PATTERN).convert(mode)
    assert (rgb(encode(image, "PNG")) == np.asarray(image.convert("RGB"))).all()


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_and_keeps_256_levels(format):
    grey = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    found = rgb(encode(Image.fromarray(grey), format))
    assert (found == np.round(grey / 257)[..., None]).all()
    assert len(np.unique(found)) == 256


def test_16_bit_rgb_png_is_scaled():
    rows = b"".join(b"\0" + struct.pack(">HHH", 0x1234, 0x8000, 0xFFFF) * 4 for _ in range(4))
    assert np.abs(np.array(pixel(png(4, 4, rows, depth=16))) - (0x1234 / 257, 0x8000 / 257, 255)).max() <= 1


def test_float_tiff_is_read_as_0_to_1():
    grey = np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)
    assert (rgb(encode(Image.fromarray(grey), "TIFF"))[..., 0].ravel() == np.arange(256)).all()


@pytest.mark.parametrize("value", [1.5, -0.1, float("nan")])
def test_float_tiff_beyond_is_refused(value):
    with pytest.raises(BadImage, match="outside 0 to 1"):
        decode(encode(Image.fromarray(np.full((4, 4), value, dtype=np.float32)), "TIFF"))


def test_32_bit_integers_are_refused():
    with pytest.raises(BadImage, match="range is unknown"):
        decode(encode(Image.new("I", (4, 4), 70000), "TIFF"))


@pytest.mark.parametrize("format", ["JPEG", "TIFF"])
def test_cmyk(format):
    options = {"quality": 100} if format == "JPEG" else {}  # JPEG's CMYK is stored inverted, as Adobe does
    found = pixel(encode(Image.new("CMYK", (16, 16), (255, 0, 128, 51)), format, **options))
    expected = [(255 - c) * (255 - 51) / 255 for c in (255, 0, 128)]
    assert np.abs(np.array(found) - expected).max() <= 2


def test_transparency_is_laid_on_white_and_hides_what_is_below():
    assert pixel(encode(Image.new("RGBA", (4, 4), (255, 0, 0, 0)), "PNG")) == (255, 255, 255)
    half = pixel(encode(Image.new("RGBA", (4, 4), (255, 0, 0, 128)), "PNG"))
    assert np.abs(np.array(half) - (255, 127, 127)).max() <= 1
    assert pixel(encode(Image.new("LA", (4, 4), (0, 0)), "PNG")) == (255, 255, 255)
    assert pixel(encode(Image.new("RGBA", (4, 4), (9, 8, 7, 255)), "PNG")) == (9, 8, 7)


def test_transparent_colours_of_palettes_rgb_and_grey():
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    assert pixel(encode(palette, "PNG", transparency=1)) == (255, 255, 255)
    assert pixel(encode(palette, "PNG", transparency=b"\xff\x80"))[1] in (126, 127, 128)
    assert pixel(encode(palette, "GIF", transparency=1)) == (255, 255, 255)
    assert pixel(encode(Image.new("RGB", (4, 4), (1, 2, 3)), "PNG", transparency=(1, 2, 3))) == (255, 255, 255)
    assert pixel(encode(Image.new("L", (4, 4), 7), "PNG", transparency=7)) == (255, 255, 255)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_the_image_upright(format, orientation):
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # what stores the upright image in this orientation
    upright = Image.fromarray(PATTERN).resize((80, 48), Image.Resampling.NEAREST)
    stored = upright.transpose(Image.Transpose(undo[orientation])) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if format == "WEBP" else {"quality": 100, "subsampling": 0} if format == "JPEG" else {}
    found = rgb(encode(stored, format, exif=exif, **options))
    assert found.shape == (48, 80, 3)
    assert np.abs(found - np.asarray(upright).astype(int)).max() <= (3 if format == "JPEG" else 0)


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0" + b"\xff" * 30, b"Exif\0\0II*\0\x08\0\0\0\xff\xff", b"Exif\0\0MM\0*\0\0\xff\xff\0"]
)
def test_broken_exif_neither_warns_nor_refuses(exif):
    data = encode(Image.new("RGB", (8, 8), (10, 20, 30)), "JPEG", quality=100, exif=exif)
    assert np.abs(np.array(pixel(data)) - (10, 20, 30)).max() <= 1


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_of_an_animation(format):
    first, second = Image.new("RGB", (8, 8), (255, 0, 0)), Image.new("RGB", (8, 8), (0, 255, 0))
    options = {"lossless": True} if format == "WEBP" else {}
    assert pixel(encode(first, format, save_all=True, append_images=[second], **options)) == (255, 0, 0)


def test_one_pixel():
    assert pixel(encode(Image.new("RGB", (1, 1), (3, 4, 5)), "PNG")) == (3, 4, 5)


def test_colour_profiles_change_nothing():
    assert pixel(encode(Image.new("RGB", (4, 4), (3, 4, 5)), "PNG", icc_profile=b"no profile")) == (3, 4, 5)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"])
def test_truncated_files_are_refused(format):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encode(Image.fromarray(noise), format)
    for length in (1, 10, len(data) // 4, len(data) // 2, len(data) * 3 // 4):
        with pytest.raises(BadImage):
            decode(data[:length])


def png(width, height, rows, depth=8, extra=b""):
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def text_bomb(kind, head):
    body = head + zlib.compress(bytes(100_000_000), 1)
    extra = struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return png(8, 8, bytes(8 * 25), extra=extra)


def tiff(**changed):
    """A tiff of 16x16 grey pixels in LZW, with some tags changed."""
    tags = {256: 16, 257: 16, 258: 8, 259: 5, 262: 1, 277: 1, 273: 200, 278: 16, 279: 100}
    tags |= {int(tag[1:]): value for tag, value in changed.items()}
    fields = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + fields + bytes(1000)


GIF_FRAME = b"\xf7\0\0" + bytes(768) + b",\0\0\0\0\xff\xff\xff\xff\0\x08\0;"
BOMBS = {
    "png of 200 megapixels": (lambda: png(20000, 10000, bytes(100)), "64 megapixels"),
    "png of 70 megapixels": (lambda: png(10000, 7000, bytes(100)), "64 megapixels: 10000x7000"),
    "gif of 4 gigapixels": (lambda: b"GIF89a" + struct.pack("<HH", 65535, 65535) + GIF_FRAME, "64 megapixels"),
    "gif with a large frame": (lambda: b"GIF89a" + struct.pack("<HH", 9, 9) + GIF_FRAME, "64 megapixels"),
    "tiff of 3 gigapixels": (lambda: tiff(t256=60000, t257=60000), "64 megapixels"),
    "tiff with a large tile": (lambda: tiff(t322=30000, t323=30000, t324=200, t325=100), "64 megapixels"),
    "tiff with a long strip": (lambda: tiff(t279=2**31 - 1), "broken"),
    "thread of 30000x1": (lambda: png(30000, 1, bytes(90001)), "longer than 100:1: 30000x1"),
    "thread of 1x10000": (lambda: png(1, 10000, bytes(40000)), "longer than 100:1: 1x10000"),
    "zTXt": (lambda: text_bomb(b"zTXt", b"a\0\0"), "too large"),
    "iTXt": (lambda: text_bomb(b"iTXt", b"a\0\1\0\0\0"), "too large"),
    "iCCP": (lambda: text_bomb(b"iCCP", b"a\0\0"), "too large"),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs_are_refused_at_once(bomb):
    make, reason = BOMBS[bomb]
    data = make()
    begin = time.thread_time()
    with pytest.raises(BadImage, match=reason):
        decode(data)
    assert time.thread_time() - begin < 2


def test_a_large_image_within_the_limit_is_read():
    assert decode(encode(Image.new("L", (8000, 8000)), "PNG", compress_level=1)).size == (8000, 8000)


def test_what_is_no_image():
    for content in (b"hello", b"<svg/>", b"%PDF-1.4", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"SIMPLE  =                    T"):
        with pytest.raises(BadImage, match="not an image of JPEG, PNG, WEBP, BMP, GIF or TIFF"):
            decode(content)


def test_what_is_no_regular_file_neither_hangs_nor_passes(tmp_path):
    os.mkfifo(tmp_path / "fifo.jpg")
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "broken.jpg").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop.jpg").symlink_to(tmp_path / "loop.jpg")
    reasons = {
        "fifo.jpg": "not a regular file",
        "folder.jpg": "not a regular file",
        "empty.jpg": "empty file",
        "broken.jpg": "No such file or directory",
        "loop.jpg": "Too many levels of symbolic links",
        "nul\0.jpg": "null byte",
    }
    for name, reason in reasons.items():
        with pytest.raises(BadImage, match=reason):
            decode(tmp_path / name)
    with pytest.raises(BadImage, match="not a regular file"):
        decode("/dev/zero")


def test_bad_image_says_file_and_reason_in_printable_words(tmp_path):
    file = tmp_path / "a\x1b[31m\n.jpg"
    file.write_bytes(b"x")
    with pytest.raises(BadImage) as caught:
        decode(file)
    assert isinstance(caught.value, DataError)
    assert caught.value.exit_code == 3
    assert caught.value.path == str(file)
    assert str(caught.value) == f"{tmp_path}/a\\x1b[31m\\n.jpg: {caught.value.reason}"


def test_names_that_are_no_text(tmp_path):
    file = os.path.join(os.fsencode(tmp_path), b"caf\xe9.png")
    with open(file, "wb") as out:
        out.write(encode(Image.fromarray(PATTERN), "PNG"))
    assert (np.asarray(decode(os.fsdecode(file))) == PATTERN).all()


def test_decoding_in_threads_leaves_the_warning_filters_alone():
    data = encode(Image.new("RGB", (64, 64)), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff")
    before, barrier = list(warnings.filters), threading.Barrier(4)

    def work(_):
        barrier.wait()
        return [decode(data).size for _ in range(50)]

    with ThreadPoolExecutor(4) as pool:
        assert sum(map(len, pool.map(work, range(4)))) == 200
    assert list(warnings.filters) == before


def _seeds():
    noise = np.random.default_rng(0).integers(0, 256, (24, 30, 4), dtype=np.uint8)
    rgba = Image.fromarray(noise)
    colour, palette = rgba.convert("RGB"), rgba.convert("RGB").convert("P")
    exif = Image.Exif()
    exif[0x0112] = 6
    return [
        encode(colour, "JPEG", exif=exif),
        encode(colour, "JPEG", progressive=True),
        encode(colour.convert("CMYK"), "JPEG"),
        encode(rgba, "PNG", exif=exif),
        encode(palette, "PNG", transparency=b"\x00\x80\xff"),
        encode(Image.fromarray(noise[..., 0].astype(np.uint16) * 200), "PNG"),
        encode(colour, "WEBP", exif=exif),
        encode(rgba, "WEBP", lossless=True),
        encode(palette, "BMP"),
        encode(palette, "GIF", save_all=True, append_images=[palette.rotate(90)]),
        encode(colour, "TIFF"),
        encode(colour, "TIFF", compression="tiff_lzw", exif=exif),
        encode(colour.convert("1"), "TIFF", compression="group4"),
    ]


@st.composite
def mutants(draw, seeds=None):
    data = bytearray(draw(st.sampled_from(seeds or _SEEDS)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        new = draw(st.binary(max_size=12))
        data[at : at + draw(st.integers(0, 30))] = new
    return bytes(data[: draw(st.integers(0, len(data)))]) if draw(st.booleans()) else bytes(data)


_SEEDS = _seeds()


# What is slow is told by this thread's own time: the machine may have other work.
STEADY = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


@settings(STEADY, max_examples=1500, derandomize=True)
@given(mutants() | st.binary(max_size=200))
def test_any_bytes_give_an_image_or_bad_image(data):
    begin = time.thread_time()
    try:
        image = decode(data)
    except BadImage as error:
        assert error.reason  # noqa: PT017 (either outcome is right)
    else:
        assert image.mode == "RGB"
    assert time.thread_time() - begin < 2


@settings(STEADY, max_examples=500, derandomize=True)
@given(mutants())
def test_the_short_way_to_pixels_takes_and_refuses_alike(data):
    assert outcome(lambda: decode_pixels(data, "x.jpg")) == outcome(lambda: pixels(decode(data, "x.jpg")))


@pytest.mark.slow
@settings(STEADY, max_examples=50_000)
@given(mutants())
def test_many_mutants(data):
    test_any_bytes_give_an_image_or_bad_image.hypothesis.inner_test(data)


def rotated(image, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(image, "JPEG", exif=exif)


def moved_behind_the_frame(data):
    """A JPEG whose EXIF comes after its frame."""
    exif, frame = data.index(b"\xff\xe1"), data.index(b"\xff\xc0")
    after, behind = (at + 2 + int.from_bytes(data[at + 2 : at + 4]) for at in (exif, frame))
    return data[:exif] + data[after:behind] + data[exif:after] + data[behind:]


PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)).resize((60, 45))


@pytest.mark.parametrize(
    "data",
    [
        encode(PHOTO, "JPEG"),
        encode(PHOTO, "JPEG", progressive=True),
        encode(PHOTO, "JPEG", quality=30, subsampling=2, icc_profile=b"no profile"),
        encode(PHOTO.convert("L"), "JPEG"),
        encode(PHOTO.convert("CMYK"), "JPEG"),
        rotated(PHOTO, 6),
        encode(PHOTO, "JPEG") + b"after the end",
        encode(PHOTO, "JPEG", comment=b"a photograph"),
        moved_behind_the_frame(rotated(PHOTO, 6)),
        encode(PHOTO.resize((64, 3)), "JPEG"),
        encode(PHOTO, "JPEG", keep_rgb=True),
        encode(PHOTO, "PNG"),
        encode(PHOTO.convert("RGBA"), "PNG"),
    ],
)
def test_the_short_way_to_pixels_gives_the_same(data):
    assert torch.equal(decode_pixels(data, "x.jpg"), pixels(decode(data)))


def outcome(decoded):
    """The pixels as bytes, or why there are none."""
    try:
        return decoded().numpy().tobytes()
    except BadImage as error:
        return str(error)


def without_its_last_scans(data):
    """A progressive JPEG that was interrupted: its decoder smooths what it does not know."""
    scans = [at for at in range(len(data)) if data[at : at + 2] == b"\xff\xda"]
    return data[: scans[3]] + b"\xff\xd9"


JPEGS = [
    encode(PHOTO.resize(size), "JPEG", **options)
    for size in ((61, 83), (16, 200))
    for options in (
        *({"subsampling": subsampling} for subsampling in (0, 1, 2)),
        {"restart_marker_blocks": 3},
        {"progressive": True},
    )
]
JPEGS.append(without_its_last_scans(encode(PHOTO.resize((61, 83)), "JPEG", progressive=True)))


@settings(STEADY, max_examples=600, derandomize=True)
@given(st.sampled_from(JPEGS).flatmap(lambda data: st.just(data) | mutants([data])), st.data())
def test_what_lies_in_a_window_is_the_same_where_nothing_below_is_decoded(data, chosen):
    boxes = []

    def window(height, width):
        left, top = chosen.draw(st.integers(0, width - 1)), chosen.draw(st.integers(0, height - 1))
        boxes.append((left, top, chosen.draw(st.integers(left + 1, width)), chosen.draw(st.integers(top + 1, height))))
        return boxes[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vitcli.data.images._hushed", True)  # as in a loader process
        found = outcome(lambda: decode_pixels(data, "x.jpg", window))
    assert len(boxes) <= 1
    box = boxes[0] if boxes else None
    assert found == outcome(lambda: pixels(decode(data, "x.jpg").crop(box)))


def test_below_a_window_nothing_is_decoded_of_which_libjpeg_tells(monkeypatch, capfd):
    def upper(height, width):
        return 0, 0, width, 20

    decode_pixels(JPEGS[0], "x.jpg", upper)
    assert capfd.readouterr().err == ""
    monkeypatch.setattr("vitcli.data.images._hushed", True)
    decode_pixels(JPEGS[0], "x.jpg", upper)
    assert "extraneous bytes" in capfd.readouterr().err
    assert decode(bytes(upper_rows(JPEGS[0], usual_frame(JPEGS[0]), 20))).size == (61, 21)


def test_decoders_are_hushed_and_python_is_not():
    script = """if True:
        import ctypes, os, sys
        from vitcli.data.images import hush_decoders
        hush_decoders()
        libc = ctypes.CDLL(None)
        libc.perror(b"by a library")
        os.write(2, b"by a library")
        print("by Python, \\udce9", file=sys.stderr)
        raise SystemExit("at the end")
    """
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stderr.splitlines() == ["by Python, \\udce9", "at the end"]


def test_the_short_way_decodes_real_images_alike(shared):
    files = sorted((shared / "data/imagenet200").glob("*/*.JPEG"))
    assert len(files) == 200
    for file in files[::4]:
        assert torch.equal(decode_pixels(file.read_bytes(), str(file)), pixels(decode(file))), file


@pytest.mark.parametrize(
    "data",
    [
        encode(PHOTO, "JPEG")[:-200],
        encode(PHOTO, "JPEG")[:30],
        b"\xff\xd8 no image \xff\xd9",
        b"\xff\xd8\xff\xe0\x00\x06JFIF" + encode(PHOTO, "JPEG")[2:],
    ],
)
def test_the_short_way_refuses_alike(data):
    with pytest.raises(BadImage) as expected:
        decode(data, "x.jpg")
    with pytest.raises(BadImage) as found:
        decode_pixels(data, "x.jpg")
    assert str(found.value) == str(expected.value)


def test_an_error_goes_through_pickle_with_all_it_says():
    for error in (BadImage("a\n.png", "torn", "mend it"), StorageError("full", "free space")):
        copy = ForkingPickler.loads(ForkingPickler.dumps(error))
        assert (type(copy), str(copy), copy.hint) == (type(error), str(error), error.hint)

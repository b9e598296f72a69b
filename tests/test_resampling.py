"""Images as a GPU resizes them are those of PIL and of torch on a CPU, to the bit."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from interpreter import interpreted, run
from PIL import Image

from vitcli.data import DataConfig, Preprocessing
from vitcli.data.handover import CHUNK, HEADER, Decoded, Deferred
from vitcli.data.loader import eval_batches, train_batches
from vitcli.data.preprocess import pixels, prepare
from vitcli.data.resampling import Part, rows_needed, sides

CPU = torch.device("cpu")
BROKEN = (0, 7, *range(32, 48), 99)
lengths = st.integers(1, 300)

SCRIPT = """
import torch
from vitcli.data import Preprocessing
from vitcli.data.handover import Deferred
from vitcli.data.preprocess import pixels, prepare
from vitcli.data.workers import load
from test_resampling import BROKEN, CPU, given_and_taken, noise, sample

for sizes, res, resize, interpolation, antialias in (
    ([(30, 22), (17, 25), (2, 3), (50, 10)], (9, 8), 10, "bilinear", True),
    ([(25, 18), (16, 25), (2, 3), (10, 20)], (8, 9), 9, "bicubic", True),
    ([(90, 9), (9, 30)], (7, 7), None, "bicubic", True),
    ([(30, 22), (17, 25), (2, 3)], (6, 9), None, "bilinear", False),
):
    p = Preprocessing(res=res, resize=resize, interpolation=interpolation, antialias=antialias)
    images = [noise(*size, seed) for seed, size in enumerate(sizes)]
    assert torch.equal(given_and_taken(images, p), torch.stack([prepare(image, p) for image in images])), p
# One process, whose places are used again and again; a chunk that begins with a broken image, and two of none else.
p, batches = Preprocessing(res=(2, 3), resize=4), [list(range(48)), list(range(48, 99)), [99]]
for part, batch in zip(load(sample, Deferred(p, CPU), batches, 1), batches, strict=True):
    whole = [number for number in batch if number not in BROKEN]
    assert part.indices.tolist() == whole
    images = [prepare(noise(4 + n % 9, 6, n), p) for n in whole]
    assert torch.equal(part.images, torch.stack(images) if images else part.images[:0])
    assert [index for index, *_ in part.bad] == [number for number in batch if number in BROKEN]
print("equal")
"""


def noise(width, height, seed=0):
    """An image of the darkest and the brightest levels, where sums are as large as can be, and some between."""
    chance = np.random.default_rng(seed)
    levels = chance.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(np.where(levels < 100, 0, np.where(levels > 155, 255, levels)).astype(np.uint8))


def sample(number):
    """What a loader process loads."""
    if number in BROKEN:
        return None, number, [(number, f"{number}.jpg", "broken")]
    return Decoded(pixels(noise(4 + number % 9, 6, number))), number, []


def decoded(image, p):
    """The rows that count, as a loader process decodes them."""
    x, rows = pixels(image), rows_needed((image.height, image.width), p)
    return Decoded(x[:, :rows], image.height - rows)


def given_and_taken(images, p):
    """By the two ends of a chunk."""
    handover = Deferred(p, CPU)
    room, found = torch.full(handover.room, 201, dtype=torch.uint8), handover.empty(len(images))
    for number, image in enumerate(images):
        handover.give(room, number, decoded(image, p))
    handover.take(room, found)
    return found


def along(side, levels):
    """What the rows of `levels` (n, ...) add up to, by a table."""
    needed = levels[side.begin : side.end].astype(np.int32)
    found = []
    for first, *weights in side.table:
        counted = needed[first : first + len(weights)]
        found.append((np.tensordot(np.int32(weights[: len(counted)]), counted, 1) + 2 ** (side.bits - 1)) >> side.bits)
    return np.clip(found, 0, 255)


@settings(deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
@given(
    st.tuples(lengths, lengths),
    st.tuples(st.integers(1, 64), st.integers(1, 64)),
    st.none() | st.integers(0, 40),
    st.sampled_from([("bilinear", True), ("bicubic", True), ("bilinear", False)]),
)
@example((500, 375), (48, 56), 8, ("bilinear", True))
@example((333, 500), (48, 56), 8, ("bicubic", True))
@example((333, 500), (224, 224), None, ("bilinear", False))
@example((3000, 30), (40, 40), None, ("bicubic", True))
def test_tables_hold_the_resize_of_pil_and_torch(size, res, larger, how):
    interpolation, antialias = how
    resize = larger if larger is None else max(res) + larger
    p = Preprocessing(res=res, resize=resize, interpolation=interpolation, antialias=antialias)
    image = noise(*size)
    found = sides(size[::-1], p)
    assume(found)
    columns = along(found[1], np.asarray(image).swapaxes(0, 1)).swapaxes(0, 1)
    assert np.array_equal(along(found[0], columns), prepare(image, p).permute(1, 2, 0).numpy())


@pytest.mark.parametrize("p", [{"interpolation": "area"}, {"interpolation": "bicubic", "antialias": False}])
def test_other_ways_have_no_tables(p):
    assert sides((30, 40), Preprocessing.parse({"res": 8} | p)) is None


@interpreted
def test_the_device_resizes_by_them():
    run(SCRIPT)


def test_a_chunk_has_room_for_any_images():
    p = Preprocessing(res=(224, 224), resize=256)
    handover, images = Deferred(p, CPU), [noise(1000, 1100 - number, number) for number in range(CHUNK)]
    room = torch.zeros(handover.room, dtype=torch.uint8)
    for number, image in enumerate(images):
        handover.give(room, number, decoded(image, p))
    parts = [Part(*part) for part in room[:HEADER].view(torch.int32).view(CHUNK, -1).tolist()]
    ready = [number for number, part in enumerate(parts) if part.height == 224]
    assert 0 < len(ready) < CHUNK
    for number in ready:
        begin = parts[number].pixels
        found = room[begin : begin + 3 * 224 * 224].view(224, 224, 3).permute(2, 0, 1)
        assert torch.equal(found, prepare(images[number], p))


on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="on a CPU the loader processes resize, too")


@pytest.fixture
def taken(monkeypatch):
    """How many images each chunk had that a GPU resized."""
    counts, take = [], Deferred.take

    def noted(handover, room, images):
        counts.append(len(images))
        take(handover, room, images)

    monkeypatch.setattr(Deferred, "take", noted)
    return counts


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """JPEGs of many sizes, the sixth of them broken."""
    root = tmp_path_factory.mktemp("data")
    (root / "a").mkdir()
    for number in range(70):
        noise(100 + 17 * number, 900 - 12 * number, number).save(root / f"a/{number:02}.jpg", quality=95)
    (root / "a/05.jpg").write_bytes(b"broken")
    return root


def config(folder, **keys):
    return DataConfig.parse({"source": {"name": "folder", "path": str(folder)}, **keys})


@on_gpu
@pytest.mark.parametrize(
    "p",
    [{"resize": 256}, {"resize": 256, "interpolation": "bicubic"}, {"resize": None}, {"antialias": False}],
    ids=["usual", "bicubic", "whole", "torch"],
)
def test_evaluation_reads_the_same_on_a_gpu_as_on_a_cpu(folder, taken, p):
    data = config(folder, **p)
    dataset, found = data.source.open_for_scoring(), []
    for device in ("cpu", "cuda"):
        parts = list(eval_batches(data.preprocessing, dataset, batch=32, workers=2, device=torch.device(device)))
        found.append((torch.cat([part["images"].cpu() for part in parts]), [part.get("bad") for part in parts]))
    (prepared, bad), (ours, same) = found
    assert torch.equal(ours, prepared)
    assert bad == same
    assert list(bad[0]) == [5]
    assert sum(taken) == 70


@on_gpu
@pytest.mark.parametrize("how", [{}, {"interpolation": "bicubic", "antialias": True}], ids=["usual", "bicubic"])
def test_training_reads_the_same_on_a_gpu_as_on_a_cpu(folder, taken, how):
    augment = {"randaugment": {"n": 1, "m": 5}, **how}
    data, found = config(folder, bad_images=0.1, workers=2, augment=augment), []
    for device in ("cpu", "cuda"):
        dataset = data.source.open("train")
        parts = train_batches(data, dataset, batch=32, seed=3, start=0, steps=4, device=torch.device(device))
        found.append(torch.cat([part["images"].cpu() for part in parts]))
    assert torch.equal(*found)
    assert sum(taken) == 128

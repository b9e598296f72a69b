"""How often images are shown where classes are not equally large, and what their loss counts."""

import numpy as np
import pytest
import torch
from command import TINY, Vit, sets
from torch.nn import functional as F

from vitcli.data import DataConfig
from vitcli.data.loader import train_batches
from vitcli.data.sampling import epoch_order, repeat_factors, told, turns
from vitcli.data.sources._arrays import Arrays
from vitcli.objectives.classify import Classify

COUNTS = (600, 300, 90, 9, 1)


@pytest.fixture
def vit(capsys, monkeypatch):
    return Vit(capsys, monkeypatch)


@pytest.fixture(scope="module")
def dataset():
    """A thousand images of five classes of very different size; a pixel tells the image."""
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(5), COUNTS))
    pixels = np.zeros((1000, 2, 2, 3), dtype=np.uint8)
    pixels[..., 0], pixels[..., 1] = (np.arange(1000) // 256)[:, None, None], (np.arange(1000) % 256)[:, None, None]
    return Arrays("unequal", pixels, labels, list("abcde"))


def epoch(dataset, sampling, seed=0, threshold=1e-3):
    return epoch_order(dataset, sampling, threshold, np.random.default_rng(seed))


def test_uniform_is_the_permutation_that_it_was(dataset):
    assert (epoch(dataset, "uniform") == np.random.default_rng(0).permutation(1000)).all()


def test_balanced_shows_each_class_equally_often_and_no_image_much_more_than_another(dataset):
    order = epoch(dataset, "balanced")
    assert np.bincount(dataset.labels[order]).tolist() == [200] * 5
    shown = np.bincount(order, minlength=1000)
    for label, count in enumerate(COUNTS):
        own = shown[dataset.labels == label]
        assert own.max() - own.min() <= 1
        assert own.sum() == 200 == own.mean() * count
    assert not (order == epoch(dataset, "balanced", seed=1)).all()
    assert (order == epoch(dataset, "balanced")).all()
    others = Arrays("x", np.zeros((7, 1, 1), np.uint8), [0, 0, 3, 3, 3, 3, 1], list("abcd"))  # c is empty
    counts = [np.bincount(others.labels[epoch(others, "balanced", seed)], minlength=4).tolist() for seed in range(30)]
    assert {tuple(count) for count in counts} == {(3, 2, 0, 2), (2, 3, 0, 2), (2, 2, 0, 3)}


def test_repeat_factors_are_those_of_lvis(dataset):
    factors = repeat_factors(dataset, 0.1)
    assert factors == pytest.approx([1, 1, (0.1 / 0.09) ** 0.5, (0.1 / 0.009) ** 0.5, 10])
    shown = np.mean([np.bincount(epoch(dataset, "repeat_factor", seed, 0.1), minlength=1000) for seed in range(200)], 0)
    by_class = np.array([shown[dataset.labels == label].mean() for label in range(5)])
    assert by_class / by_class[0] == pytest.approx(factors, rel=0.05)
    assert shown.sum() == pytest.approx(1000)


def test_turns_count_the_times_before():
    order = np.array([3, 1, 3, 3, 0, 1])
    assert turns(order, "balanced").tolist() == [0, 0, 1, 2, 0, 1]
    assert turns(np.arange(5)[::-1], "repeat_factor").tolist() == [0] * 5
    assert turns(np.arange(5), "uniform").tolist() == [0] * 5


def test_a_repeated_image_is_augmented_anew_and_a_run_can_start_anywhere(dataset):
    augment = {"crop": "random_crop", "pad": 30, "flip": False, "resize": 40, "randaugment": {"n": 1, "m": 5}}

    def batches(start, keep=False):
        data = {"source": "digits", "res": 40, "augment": augment, "sampling": "balanced", "workers": 0, "keep": keep}
        return list(train_batches(DataConfig.parse(data), dataset, batch=100, seed=3, start=start, steps=12))

    whole = batches(0)
    for start, keep in ((7, False), (0, True), (3, True)):
        for expected, found in zip(whole[start:], batches(start, keep), strict=True):
            assert torch.equal(expected["images"], found["images"])
            assert torch.equal(expected["labels"], found["labels"])
    augment.pop("randaugment")
    whole = batches(0)
    only = int(np.flatnonzero(dataset.labels == 4)[0])
    images = torch.cat([part["images"][part["labels"] == 4] for part in whole[:10]])
    assert len(images) == 200
    assert (images.amax((2, 3))[:, 1] <= only % 256).all()
    assert len({image.numpy().tobytes() for image in images}) > 100  # of 3,721 places, not one


def weights(kind):
    return Classify.parse({"class_weights": kind}).constants(COUNTS)["class_weights"]


def test_class_weights_are_one_in_the_mean_over_images():
    counts = torch.tensor(COUNTS, dtype=torch.float32)
    for kind in ("inverse", "effective"):
        assert (weights(kind) * counts).sum() / counts.sum() == pytest.approx(1)
    assert weights("inverse") * counts == pytest.approx(torch.full((5,), 200.0))
    base = 1 - 1 / 200
    effective = (1 - base ** counts.double()) / (1 - base)
    expected = 1 / effective
    expected = expected * counts.sum() / (expected * counts).sum()
    assert weights("effective").tolist() == pytest.approx(expected.tolist(), rel=1e-5)
    assert Classify.parse({"class_weights": "inverse"}).constants([3, 0])["class_weights"].tolist() == [1, 0]


class Logits(torch.nn.Module):
    """Stands for a ViT: the images are its logits."""

    def forward(self, images):
        return images


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_the_loss_of_an_image_counts_what_its_class_does(loss):
    torch.manual_seed(0)
    logits, labels = torch.randn(8, 5), torch.randint(5, (8,))
    module = Classify.parse({"loss": loss, "class_weights": "inverse", "label_smoothing": 0.1}).build(Logits(), COUNTS)
    assert "class_weights" not in module.state_dict()
    targets = F.one_hot(labels, 5).float()
    smooth = targets * 0.9 + 0.1 / 5
    if loss == "softmax":
        each = F.cross_entropy(logits, labels, reduction="none", label_smoothing=0.1)
    else:
        each = F.binary_cross_entropy_with_logits(logits, smooth, reduction="none").sum(1)
    found = module({"images": logits, "targets": targets})["loss"]
    assert found == pytest.approx(float((each * weights("inverse")[labels]).mean()), rel=1e-5)
    mixed = 0.7 * targets + 0.3 * targets.roll(1, 0)
    share = 0.7 * weights("inverse")[labels] + 0.3 * weights("inverse")[labels.roll(1)]
    plain = Classify.parse({"loss": loss, "label_smoothing": 0.1}).build(Logits())
    one_by_one = [plain({"images": logits[i : i + 1], "targets": mixed[i : i + 1]})["loss"] for i in range(8)]
    found = module({"images": logits, "targets": mixed})["loss"]
    assert found == pytest.approx(float((torch.stack(one_by_one) * share).mean()), rel=1e-5)


def test_a_run_says_what_it_did(tmp_path, monkeypatch, vit):
    monkeypatch.chdir(tmp_path)
    balance = ("data.sampling=balanced", "objective.class_weights=effective", "steps=6")
    said = vit("pretrain", "quickstart", *sets(*TINY, *balance), "--run", "run")
    assert said.code == 0, said.err
    assert "balanced sampling of 10 classes of 127 to 161 images: 143.8 of each an epoch" in said.out
    assert "effective class weights: an image counts 0.938 to 1.08" in said.out
    assert "balanced sampling" in (tmp_path / "run/train.log").read_text()
    said = vit("pretrain", "quickstart", *sets("data.repeat_threshold=0.1"))
    assert said.code == 2
    assert "has no effect with uniform; it is for repeat_factor" in said.err


def test_repeat_factors_are_told(dataset):
    (line,) = told(dataset, "repeat_factor", 0.1)
    assert "5 classes of 1 to 600 images, threshold 0.1" in line
    mean = (900 + 90 * (0.1 / 0.09) ** 0.5 + 9 * (0.1 / 0.009) ** 0.5 + 10) / 1000
    assert f"smallest class {10 / mean:.3g} times, of the largest {1 / mean:.3g} times" in line
    assert told(dataset, "uniform", 0.1) == ()

"""What `vit bench` measures: training, inference and loading, as vitcli does them and as its peers do at their best."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import count, repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vitcli import checkpoint, optim, rng
from vitcli.bench import peer_data, peers
from vitcli.bench.measure import Contender
from vitcli.data import Preprocessing
from vitcli.data.loader import train_batches
from vitcli.data.mix import mix, ready, targets_of
from vitcli.data.prefetch import AHEAD, Batch, put
from vitcli.data.sources import Dataset
from vitcli.inference import Predictor, TorchPredictor
from vitcli.onnx.model import OnnxPredictor
from vitcli.processes import ALONE
from vitcli.recipe import Recipe
from vitcli.rng import Stream
from vitcli.runtime import Runtime
from vitcli.training.gradients import Engine
from vitcli.training.micro_batch import MicroBatch
from vitcli.training.state import Position
from vitcli.training.update import Update

if TYPE_CHECKING:
    from vitcli.model import ViTConfig

ENDLESS = 1_000_000  # updates, more than any measurement takes

Call = Callable[[], object]
Feed = Callable[[str, int], Iterator[tuple[Tensor, Tensor]]]  # of a contender, a batch: normalised images and targets


@dataclass(frozen=True)
class Subject:
    """The model that is measured. Of an .onnx neither architecture nor module is known, but its predictor is."""

    name: str
    classes: int
    preprocessing: Preprocessing
    config: ViTConfig | None = None
    module: Any = None
    predictor: Predictor | None = None


def training(recipe: Recipe, runtime: Runtime, against: list[str], from_disk: bool) -> list[Contender]:
    """Training steps of a recipe's model: forward, backward, clipping and update, on one batch that is on the device
    already, or, `from_disk`, on the recipe's own images, which are then loaded and augmented meanwhile.

    The peers get the same loss, precision and clipping, torch's fused optimiser, and are compiled as a whole where ours
    is compiled. From disk they load the images as they do it themselves, and ours enters once more on one batch.
    """
    feed = partial(_loaded if from_disk else _one_batch, recipe, runtime)
    own, peer = partial(_own_step, recipe, feed), partial(_peer_step, recipe, runtime, feed)
    found = [Contender("vitcli", runtime.settings(), partial(own, runtime)), *_rivals(against, runtime, own, peer)]
    if from_disk:
        found = [replace(one, settings=f"{one.settings}; from disk", before=_waiting(recipe)) for one in found]
        alone = partial(_own_step, recipe, partial(_one_batch, recipe, runtime), runtime)
        found.insert(1, Contender("vitcli", f"{runtime.settings()}; one batch", alone))
    return found


def _own_step(recipe: Recipe, feed: Feed, runtime: Runtime, batch: int) -> Call:
    """An update as `train.fit` does it."""
    recipe = recipe.model_copy(update={"batch": batch})
    model = recipe.model.build(classes(recipe), recipe.data.res)
    module = runtime.prepare(recipe.objective.build(model, [1] * classes(recipe))).train()
    engine = Engine(module, ALONE, "ddp", None, runtime.device)
    optimizer = optim.build(recipe.optim, module)
    average = optim.Average(module, recipe.optim.ema) if recipe.optim.ema else None
    at_a_time = min(batch, recipe.runtime.micro_batch or batch)
    micro_batch = MicroBatch(at_a_time, Position(), ALONE, rigid=True, tell=print)
    update = Update(recipe, engine, optimizer, average, runtime, ALONE, micro_batch)
    fed = feed("vitcli", batch)
    return lambda: update(0, *next(fed), lr=recipe.optim.lr)


def _peer_step(recipe: Recipe, runtime: Runtime, feed: Feed, name: str, batch: int) -> Call:
    """An update as a peer's users write it at its best."""
    fed = feed(name, batch)
    model = peers.build(name, recipe.model, classes(recipe), recipe.data.res).to(runtime.device).train()
    if runtime.compile:
        model.compile(dynamic=False)
    module: Any = recipe.objective.build(model, [1] * classes(recipe))  # pyright: ignore[reportArgumentType] (the same loss round any model)
    o, parameters = recipe.optim, list(model.parameters())
    if o.name == "sgd":
        optimizer = torch.optim.SGD(parameters, o.lr, o.momentum, fused=True)
    else:  # torch's Muon takes matrices alone, one after the other
        optimizer = torch.optim.AdamW(parameters, o.lr, (o.beta1, o.beta2), o.eps, o.weight_decay, fused=True)

    def step() -> None:
        images, targets = next(fed)
        with runtime.autocast():
            loss = module({"images": images, "targets": targets})["loss"]
        loss.backward()
        if o.clip is not None:
            nn.utils.clip_grad_norm_(parameters, o.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _one_batch(recipe: Recipe, runtime: Runtime, name: str, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Noise for images, and a class of each, on the device: for all the same."""
    images = torch.randn(batch, 3, *recipe.data.res)
    targets = nn.functional.one_hot(torch.randint(classes(recipe), (batch,)), classes(recipe)).float()
    return repeat((put(images, runtime.device), put(targets, runtime.device)))


def _loaded(recipe: Recipe, runtime: Runtime, name: str, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The recipe's training images and their targets, mixed; in a peer's name as it loads them itself."""
    data, dataset, device = recipe.data, recipe.data.source.open("train"), runtime.device
    number = len(dataset.classes)
    chances = (rng.generator(recipe.seed, Stream.MIX, step) for step in count())
    if name in peers.NAMES:
        for images, labels in peer_data.batches(name, data, dataset, batch, device):
            yield mix(images, targets_of(labels, number), data.augment, next(chances))
    else:
        for made in _train_batches(recipe, dataset, batch, device):
            yield ready(made, data, number, batch, next(chances))


def _train_batches(recipe: Recipe, dataset: Dataset, batch: int, device: torch.device) -> Iterator[Batch]:
    """Raises DataError where there are too few images for a batch."""
    recipe.model_copy(update={"batch": batch}).length(len(dataset))
    return train_batches(recipe.data, dataset, batch=batch, seed=recipe.seed, start=0, steps=ENDLESS, device=device)


def _waiting(recipe: Recipe) -> int:
    """Batches that are loaded at most while nobody asks: two for each loader process, and those on the device."""
    return 2 * peer_data.workers(recipe.data) + AHEAD


def classes(recipe: Recipe) -> int:
    """As the recipe says, else as the data has."""
    return recipe.data.classes or len(recipe.data.source.open("train").classes)


def of_recipe(recipe: Recipe) -> Subject:
    """A recipe's model with fresh weights."""
    module = recipe.model.build(classes(recipe), recipe.data.res)
    return Subject("vitcli", classes(recipe), recipe.data.preprocessing, recipe.model, module)


def of_checkpoint(path: Path, runtime: Runtime) -> Subject:
    """The model of a checkpoint or an .onnx. Raises CheckpointError."""
    if path.suffix.lower() == ".onnx":
        predictor = OnnxPredictor(path, "cpu" if runtime.device.type == "cpu" else "auto")
        return Subject(f"vitcli {path.name}", len(predictor.classes), predictor.preprocessing, predictor=predictor)
    trained = checkpoint.load(path)
    return Subject(f"vitcli {path.name}", trained.model.classes, trained.preprocessing, trained.config, trained.model)


def inference(subjects: list[Subject], runtime: Runtime, against: list[str]) -> list[Contender]:
    """Answers for uint8 images in host memory: upload, normalising, the model, and its logits back in host memory.

    The peers are of the first subject's architecture, answer through the same predictor and are compiled as a whole
    where ours is compiled.
    """

    own, peer = partial(_own_answers, subjects[0]), partial(_peer_answers, subjects[0], runtime)
    attention = "sdpa" if runtime.attention == "packed" else runtime.attention  # our kernels are for training
    how = replace(runtime, attention=attention).settings()
    found = [
        Contender(one.name, "ONNX Runtime" if one.predictor else how, partial(_own_answers, one, runtime))
        for one in subjects
    ]
    return [*found, *_rivals(against, runtime, own, peer)]


def _own_answers(subject: Subject, runtime: Runtime, batch: int) -> Call:
    predictor = subject.predictor or _predictor(runtime.prepare(copy.deepcopy(subject.module)), subject, runtime)
    return _answers(predictor, batch)


def _peer_answers(subject: Subject, runtime: Runtime, name: str, batch: int) -> Call:
    assert subject.config, "peers are asked for with a known architecture only"
    model = peers.build(name, subject.config, subject.classes, subject.preprocessing.res).to(runtime.device)
    if runtime.compile:
        model.compile(dynamic=False)
    return _answers(_predictor(model, subject, runtime), batch)


def _predictor(module: Any, subject: Subject, runtime: Runtime) -> TorchPredictor:
    return TorchPredictor(runtime.frozen(module.eval()), (), subject.preprocessing, runtime, subject.name)


def _answers(predictor: Predictor, batch: int) -> Call:
    images = torch.randint(0, 256, (batch, 3, *predictor.preprocessing.res), dtype=torch.uint8)
    return lambda: predictor.logits(images)


def loading(recipe: Recipe, runtime: Runtime, against: list[str]) -> list[Contender]:
    """The recipe's training batches, read and augmented as for training, on the device, and handed to nobody."""
    data, device = recipe.data, runtime.device

    def own(batch: int) -> Call:
        batches = _train_batches(recipe, data.source.open("train"), batch, device)
        return lambda: next(batches)

    def peer(name: str, batch: int) -> Call:
        batches = peer_data.batches(name, data, data.source.open("train"), batch, device)
        return lambda: next(batches)

    before = _waiting(recipe) if against else 0
    usual = "usual" if data.workers is None else str(data.workers)
    theirs = f"{peer_data.workers(data)} loader processes, its own transforms"
    return [
        Contender("vitcli", f"{usual} loader processes", own, before),
        *(Contender(name, theirs, partial(peer, name), before) for name in against),
    ]


def _rivals(
    against: list[str], runtime: Runtime, own: Callable[[Runtime, int], Call], peer: Callable[[str, int], Call]
) -> Iterator[Contender]:
    """The peers that are asked for, and this model as torch computes it by itself."""
    for name in against:
        if name == peers.PLAIN:
            how = replace(runtime, precision="fp32", residual="fp32", attention="sdpa", compile=False)
            yield Contender(name, how.settings(), partial(own, how))
        else:
            whole = ", compiled whole" if runtime.compile else ""
            yield Contender(name, f"{runtime.precision}, its own attention{whole}", partial(peer, name))


@contextmanager
def each_compiled_alone(runtime: Runtime) -> Iterator[None]:
    """Graphs for the one batch they are compiled for, however many batches and models are compiled."""
    if not runtime.compile:
        yield
        return
    import torch._dynamo

    with torch._dynamo.config.patch(automatic_dynamic_shapes=False, recompile_limit=1024):
        yield

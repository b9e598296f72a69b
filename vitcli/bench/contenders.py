"""What `vit bench` measures: training, inference and loading, as vitcli does them and as its peers do at their best."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vitcli import checkpoint, optim
from vitcli.bench import peers
from vitcli.bench.measure import Contender
from vitcli.data import Preprocessing
from vitcli.data.loader import train_batches
from vitcli.data.prefetch import put
from vitcli.inference import Predictor, TorchPredictor
from vitcli.onnx.model import OnnxPredictor
from vitcli.processes import ALONE
from vitcli.recipe import Recipe
from vitcli.runtime import Runtime
from vitcli.training.gradients import Engine
from vitcli.training.micro_batch import MicroBatch
from vitcli.training.state import Position
from vitcli.training.update import Update

if TYPE_CHECKING:
    from vitcli.model import ViTConfig

ENDLESS = 1_000_000  # updates, more than any measurement takes

Call = Callable[[], object]


@dataclass(frozen=True)
class Subject:
    """The model that is measured. Of an .onnx neither architecture nor module is known, but its predictor is."""

    name: str
    classes: int
    preprocessing: Preprocessing
    config: ViTConfig | None = None
    module: Any = None
    predictor: Predictor | None = None


def training(recipe: Recipe, runtime: Runtime, against: list[str]) -> list[Contender]:
    """Training steps of a recipe's model: forward, backward, clipping and update, on a batch already on the device.

    The peers get the same batch, loss, precision and clipping, torch's fused optimiser, and are compiled as a whole
    where ours is compiled.
    """
    own, peer = partial(_own_step, recipe), partial(_peer_step, recipe, runtime)
    return [Contender("vitcli", settings(runtime), partial(own, runtime)), *_rivals(against, runtime, own, peer)]


def _own_step(recipe: Recipe, runtime: Runtime, batch: int) -> Call:
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
    return partial(update, 0, **_batch(recipe, runtime, batch), lr=recipe.optim.lr)


def _peer_step(recipe: Recipe, runtime: Runtime, name: str, batch: int) -> Call:
    """An update as a peer's users write it at its best."""
    model = peers.build(name, recipe.model, classes(recipe), recipe.data.res).to(runtime.device).train()
    if runtime.compile:
        model.compile(dynamic=False)
    module: Any = recipe.objective.build(model, [1] * classes(recipe))  # pyright: ignore[reportArgumentType] (the same loss round any model)
    o, parameters = recipe.optim, list(model.parameters())
    if o.name == "sgd":
        optimizer = torch.optim.SGD(parameters, o.lr, o.momentum, fused=True)
    else:  # torch's Muon takes matrices alone, one after the other
        optimizer = torch.optim.AdamW(parameters, o.lr, (o.beta1, o.beta2), o.eps, o.weight_decay, fused=True)
    part = _batch(recipe, runtime, batch)

    def step() -> None:
        with runtime.autocast():
            loss = module(part)["loss"]
        loss.backward()
        if o.clip is not None:
            nn.utils.clip_grad_norm_(parameters, o.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _batch(recipe: Recipe, runtime: Runtime, batch: int) -> dict[str, Tensor]:
    """Noise for images, and a class of each, on the device."""
    images = torch.randn(batch, 3, *recipe.data.res)
    targets = nn.functional.one_hot(torch.randint(classes(recipe), (batch,)), classes(recipe)).float()
    return {"images": put(images, runtime.device), "targets": put(targets, runtime.device)}


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
    found = [
        Contender(one.name, "ONNX Runtime" if one.predictor else settings(runtime), partial(_own_answers, one, runtime))
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
    return TorchPredictor(module.eval(), (), subject.preprocessing, runtime, subject.name)


def _answers(predictor: Predictor, batch: int) -> Call:
    images = torch.randint(0, 256, (batch, 3, *predictor.preprocessing.res), dtype=torch.uint8)
    return lambda: predictor.logits(images)


def loading(recipe: Recipe, runtime: Runtime) -> list[Contender]:
    """The recipe's training batches, read and augmented on the device as for training, and handed to nobody."""

    def prepare(batch: int) -> Call:
        data = recipe.data
        dataset, device = data.source.open("train"), runtime.device
        batches = train_batches(data, dataset, batch=batch, seed=recipe.seed, start=0, steps=ENDLESS, device=device)
        return lambda: next(batches)

    chosen = recipe.data.workers
    workers = "usual" if chosen is None else str(chosen)
    return [Contender("vitcli", f"{workers} loader processes", prepare)]


def _rivals(
    against: list[str], runtime: Runtime, own: Callable[[Runtime, int], Call], peer: Callable[[str, int], Call]
) -> Iterator[Contender]:
    """The peers that are asked for, and this model as torch computes it by itself."""
    for name in against:
        if name == peers.PLAIN:
            how = replace(runtime, precision="fp32", residual="fp32", attention="sdpa", compile=False)
            yield Contender(name, settings(how), partial(own, how))
        else:
            whole = ", compiled whole" if runtime.compile else ""
            yield Contender(name, f"{runtime.precision}, its own attention{whole}", partial(peer, name))


def settings(runtime: Runtime) -> str:
    """How vitcli computes, in a few words."""
    facts = runtime.describe()
    between = f" ({facts['residual']} between blocks)" if facts["residual"] != facts["precision"] else ""
    compiled = ", compiled" if facts["compile"] else ""
    return f"{facts['precision']}{between}, {facts['attention']} attention{compiled}"


@contextmanager
def each_compiled_alone(runtime: Runtime) -> Iterator[None]:
    """Graphs for the one batch they are compiled for, however many batches and models are compiled."""
    if not runtime.compile:
        yield
        return
    import torch._dynamo

    with torch._dynamo.config.patch(automatic_dynamic_shapes=False, recompile_limit=1024):
        yield

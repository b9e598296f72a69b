"""Changed files of weights: each loads, or is refused in one line; none runs code, hangs or takes much memory.

The n-th mutant is the same in every run: `mutant(n, ...)` makes it from the seeds, which are small models in every
layout and container. `-m slow -s` shows how many of each container load and are refused.
"""

import io
import json
import pickle  # noqa: TID251 - to write what must not be read
import resource
import signal
import struct
import time
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any

import flax_files
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from vitcli import checkpoint
from vitcli.errors import CheckpointError
from vitcli.model import ViTConfig
from vitcli.weights import Foreign, _files, clip, google, huggingface, mmpretrain, timm, torchvision
from vitcli.weights._names import rename

SIZES: dict[str, Any] = {"width": 32, "depth": 2, "mlp_dim": 48, "heads": 2, "patch": 4, "activation": "gelu"}
NUMBERS = (0, 1, -1, 2, 3, 7, 127, 255, 256, 65535, 1 << 16, 1 << 24, 1 << 31, (1 << 32) - 1, 1 << 62, (1 << 64) - 1)
VALUES = (None, True, "", "x", "\x1b[31m\n", 0, -1, 1.5, 1e308, float("nan"), 10**30, [], {}, [[]], [1, 2, 3], {"a": 1})
DTYPES = (torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool, torch.complex64)


@dataclass
class Seed:
    """A file of weights: tensors, and the JSON that may stand in a .safetensors' metadata and beside it."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str] = field(default_factory=dict)
    beside: dict[str, Any] = field(default_factory=dict)


# Seeds


def model(**config: Any) -> Foreign:
    parsed = ViTConfig(**{**SIZES, **config})
    built = parsed.build(5, (16, 16))
    for parameter in built.parameters():
        nn.init.normal_(parameter, std=0.2)
    state = {name: tensor.detach() for name, tensor in built.state_dict().items()}
    pixels = {"res": (16, 16), "resize": 18, "interpolation": "bicubic", "mean": (0.5,) * 3, "std": (0.5,) * 3}
    return Foreign("timm", parsed, state, 5, (16, 16), pixels, tuple("abcde"))


def written(format: ModuleType, folder: Path, **config: Any) -> Seed:
    """What a format's own writer makes."""
    out = folder / format.__name__
    format.write(model(**config), out)
    if not out.is_dir():
        if zipfile.is_zipfile(out):
            with np.load(out) as arrays:
                return Seed({name: torch.from_numpy(array) for name, array in arrays.items()})
        return Seed(load_file(out), _files.read_beside(out).metadata)
    beside = {file.name: json.loads(file.read_text()) for file in out.glob("*.json")}
    return Seed(load_file(out / "model.safetensors"), {}, beside)


def flax(**layout: Any) -> dict[str, Tensor]:
    sizes = {"width": 32, "hidden": 48, "heads": 2, "patch": 4, "classes": 5, **layout}
    return {name: torch.from_numpy(array) for name, array in flax_files.arrays(**sizes).items()}


def renamed(table: dict[str, str], **config: Any) -> dict[str, Tensor]:
    """A model under another project's names."""
    return rename(model(**config).state, {ours: theirs for theirs, ours in table.items()})


def deit3() -> dict[str, Tensor]:
    state = model(layerscale=0.1, posemb_class=False).state
    return {name.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): state[name] for name in state}


def openai() -> dict[str, Tensor]:
    state = renamed(clip.NAMES, pre_norm=True, activation="quick_gelu")
    state = {f"visual.{name}": tensor for name, tensor in state.items() if name not in ("conv1.bias", "head.bias")}
    for name in ("visual.class_embedding", "visual.positional_embedding"):
        state[name] = state[name].flatten(0, -2).squeeze(0)
    state["visual.proj"] = state["visual.proj"].t().contiguous()
    numbers = dict.fromkeys(clip.NUMBERS, torch.tensor(16))
    return {**state, "transformer.resblocks.0.ln_1.weight": torch.ones(4), "logit_scale": torch.ones(()), **numbers}


@pytest.fixture(scope="module")
def seeds(tmp_path_factory) -> dict[str, Seed]:
    """One or more for each format."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("written")
    plain, sharded = model().state, written(huggingface, folder)
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(sharded.tensors, "shard")}
    sharded.beside["model.safetensors.index.json"] = index
    mask, decoder = {"mask_token": torch.zeros(1, 1, 8)}, {"decoder_embed.weight": torch.zeros(8, 32)}
    return {
        "google": written(google, folder, activation="gelu_tanh"),
        "google hybrid": Seed(flax(rows=5, units=(1,), patch=1)),
        "google with optimiser": Seed({f"opt/target/{name}": tensor for name, tensor in flax().items()}),
        "big_vision": Seed(flax(names=flax_files.CURRENT, table="pos_embedding", rows=16, cls=False, map_head=True)),
        "timm": written(timm, folder),
        "timm distilled": Seed(model(distilled=True).state),
        "timm registers": Seed(model(registers=2, layerscale=0.1, qk_norm=True, posemb_class=False).state),
        "torchvision": written(torchvision, folder),
        "huggingface": written(huggingface, folder),
        "huggingface sharded": sharded,
        "deit3": Seed(deit3()),
        "dino": Seed(model(layerscale=0.1).state | mask),
        "mae": Seed(plain | mask | decoder),
        "mmpretrain": Seed(renamed(mmpretrain.NAMES, layerscale=0.1)),
        "clip": Seed(openai()),
    }


# Containers


class Payload:
    """Makes a file if it is unpickled by anything but a restricted reader."""

    marker: Path

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


def npz(seed: Seed, random: Random) -> bytes:
    out = io.BytesIO()
    arrays = {name: numpy(tensor) for name, tensor in seed.tensors.items()}
    (np.savez if random.random() < 0.8 else np.savez_compressed)(out, **arrays)
    return out.getvalue()


def numpy(tensor: Tensor) -> np.ndarray:
    return tensor.view(torch.int16).numpy().view("V2") if tensor.dtype == torch.bfloat16 else tensor.numpy()


def safetensors(seed: Seed, random: Random) -> bytes:
    return save({name: tensor.clone().contiguous() for name, tensor in seed.tensors.items()}, seed.metadata)


def pytorch(seed: Seed, random: Random) -> bytes:
    out = io.BytesIO()
    content: dict[Any, Any] = dict(seed.tensors)
    if random.random() < 0.3:
        content = {"model": content, "epoch": 1, "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}}}
    if random.random() < 0.2:
        content["payload"] = Payload()
    torch.save(content, out, _use_new_zipfile_serialization=random.random() < 0.6)
    return out.getvalue()


# Mutations


def change_tensors(tensors: dict[str, Tensor], other: Seed, random: Random) -> None:
    """Drop, rename, repeat, reshape or change one tensor, or take one from elsewhere."""
    name = random.choice(sorted(tensors))
    tensor = tensors[name]
    match random.randrange(16):
        case 0:
            del tensors[name]
        case 1:
            tensors[random.choice(sorted(other.tensors))] = tensors.pop(name)
        case 2:
            digits = [i for i, letter in enumerate(name) if letter.isdigit()]
            if digits:
                at, number = random.choice(digits), random.choice(("0", "1", "2", "9", "99", "-1", "", "٣", "1" * 5000))
                tensors[name[:at] + number + name[at + 1 :]] = tensor
        case 3:
            tensors[random.choice(("", ".", "\x1b[31m", "x" * 500, "blocks.", "\u2028", "🙂"))] = tensor
        case 4:
            tensors |= {
                random.choice(("module.", "backbone.", "params/")) + key: tensors.pop(key) for key in [*tensors]
            }
        case 5:
            tensors |= random.choices(list(other.tensors.items()), k=1 + random.randrange(9)) or {}
        case 6:
            tensors |= other.tensors
        case 7:
            tensors[name] = tensor.flatten()
        case 8:
            tensors[name] = tensor[None]
        case 9:
            tensors[name] = tensor.permute(random.sample(range(tensor.ndim), tensor.ndim)).contiguous()
        case 10:
            tensors[name] = torch.zeros(
                [random.choice((0, 1, 2, 3, 4, 16, 17, 32)) for _ in range(random.randrange(6))]
            )
        case 11:
            tensors[name] = tensor.to(random.choice(DTYPES))
        case 12:
            tensors[name] = torch.full(tensor.shape, random.choice((torch.nan, torch.inf, -torch.inf, 1e38, 0.0)))
        case 13:
            tensors[name] = tensors[random.choice(sorted(tensors))].clone()
        case 14:
            tensors[name] = torch.cat([tensor.flatten()] * 2)[: random.randrange(2 * tensor.numel() + 1)]
        case 15 if tensor.ndim:
            side = random.randrange(tensor.ndim)
            tensors[name] = tensor.narrow(side, 0, random.randrange(tensor.shape[side] + 1)).contiguous()


def change_bytes(content: bytes, other: bytes, random: Random) -> bytes:
    """Flip, overwrite, cut, repeat or splice some bytes; most often near the ends, where the structure is."""
    size = len(content)
    near = random.choice((64, 1024, size))
    at = random.randrange(min(near, size) + 1)
    at = size - at if random.random() < 0.4 else at
    length = random.choice((1, 2, 4, 8, 64, 1000))
    start = random.randrange(len(other) + 1)
    match random.randrange(7):
        case 0:
            return (
                content[:at] + bytes(b ^ (1 << random.randrange(8)) for b in content[at : at + 1]) + content[at + 1 :]
            )
        case 1:
            return content[:at] + random.randbytes(length) + content[at + length :]
        case 2:
            number = struct.pack("<Q", random.choice(NUMBERS) & (1 << 64) - 1)[: random.choice((1, 2, 4, 8))]
            return content[:at] + number + content[at + len(number) :]
        case 3:
            return content[:at]
        case 4:
            return content[:at] + content[at + length :]
        case 5:
            return content[:at] + other[start : start + length] + content[at:]
        case _:
            return content[:at] + other[start:]


def change_json(value: Any, random: Random) -> Any:
    """One value, key or item somewhere within is another."""
    if isinstance(value, dict) and value and random.random() < 0.9:
        key = random.choice(list(value))
        if random.random() < 0.1:
            return {name: item for name, item in value.items() if name != key}
        if random.random() < 0.1:
            return {**value, random.choice(("", "x", "\x1b[31m", *value)): value[key]}
        return {**value, key: change_json(value[key], random)}
    if isinstance(value, list) and value and random.random() < 0.7:
        at = random.randrange(len(value))
        return [*value[:at], change_json(value[at], random), *value[at + 1 :]][: random.choice((None, at))]
    if isinstance(value, int | float) and random.random() < 0.5:
        return value * random.choice((0, -1, 2, 3, 0.5, 1000, 10**9)) + random.choice((0, 1, -1))
    return random.choice(VALUES)


def change_inside(content: bytes, other: bytes, random: Random) -> bytes:
    """Change the JSON of a .safetensors, or one file of an archive, whose lengths and check sums fit again."""
    if content[8:9] == b"{":
        length = struct.unpack("<Q", content[:8])[0]
        header = json.loads(content[8 : 8 + length])
        header = json.dumps(change_json(header, random)).encode()
        return struct.pack("<Q", len(header)) + header + content[8 + length :]
    if not content.startswith(b"PK"):
        return change_bytes(content, other, random)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    name = random.choice([*files, *(name for name in files if name.endswith("data.pkl"))])
    files[name] = change_bytes(files[name], pickle.dumps(Payload()) if random.random() < 0.3 else other, random)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", random.choice((zipfile.ZIP_STORED,) * 9 + (zipfile.ZIP_DEFLATED,))) as archive:
        for name, part in files.items():
            archive.writestr(name, part)
    return out.getvalue()


def mutant(n: int, seeds: dict[str, Seed], folder: Path) -> tuple[Path, str]:
    """Write the n-th mutant; the path to load, and its container."""
    random = Random(n)
    name = random.choice(sorted(seeds))
    seed, other = seeds[name], seeds[random.choice(sorted(seeds))]
    tensors, beside, metadata = dict(seed.tensors), dict(seed.beside), dict(seed.metadata)
    kind = random.choices(("tensors", "bytes", "inside", "beside"), (4, 3, 3, 2 if beside or metadata else 0))[0]
    for _ in range(1 + random.randrange(3) if kind == "tensors" else 0):
        if tensors:
            change_tensors(tensors, other, random)
    if kind == "beside" and beside:
        file = random.choice(sorted(beside))
        beside[file] = change_json(beside[file], random)
    elif kind == "beside":
        key = random.choice(sorted(metadata))
        told = (
            change_json(json.loads(metadata[key]), random) if metadata[key].startswith("{") else random.choice(VALUES)
        )
        metadata[key] = json.dumps(told)

    changed = Seed(tensors, metadata, beside)
    container = safetensors if kind == "beside" else random.choice((npz, safetensors, pytorch))
    content = container(changed, random)
    change = {"bytes": change_bytes, "inside": change_inside}.get(kind)
    for _ in range(1 + random.randrange(3) if change else 0):
        content = change(content, random.choice((npz, safetensors))(other, random), random) if change else b""

    for old in folder.iterdir():
        old.unlink()
    if not beside:
        (folder / "weights").write_bytes(content)
        return folder / "weights", container.__name__
    for file, value in beside.items():
        text = json.dumps(value).encode()
        (folder / file).write_bytes(change_bytes(text, content, random) if random.random() < 0.05 else text)
    whole = "pytorch_model.bin" if container is pytorch else "model.safetensors"
    (folder / ("shard" if "model.safetensors.index.json" in beside else whole)).write_bytes(content)
    return folder, container.__name__


# The proof


class Hang(BaseException):
    """No `except Exception` catches it."""


@pytest.fixture
def clock() -> Iterator[None]:
    def ring(*_: object) -> None:
        raise Hang

    old = signal.signal(signal.SIGALRM, ring)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, old)


def outcome(path: Path) -> str:
    """`loads`, or the message with which a file is refused, which is one line fit to print."""
    signal.alarm(100)
    try:
        checkpoint.load(path)
    except CheckpointError as error:
        for line in (str(error), error.hint):
            assert line.isprintable(), ascii(line)
            assert len(line) < 600, line
        return str(error).replace(str(path), "FILE")
    finally:
        signal.alarm(0)
    return "loads"


def fuzz(numbers: range, seeds: dict[str, Seed], folder: Path) -> Counter[tuple[str, str]]:
    """Load these mutants: how many of each container were answered so, without what varies in a message."""
    Payload.marker = folder / "ran"
    files = folder / "files"
    files.mkdir()
    found: Counter[tuple[str, str]] = Counter()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for n in numbers:
        path, container = mutant(n, seeds, files)
        try:
            said = outcome(path)
        except BaseException as error:
            raise AssertionError(f"mutant {n}: {type(error).__name__}: {ascii(str(error))[:500]}") from error
        found[container, said.partition(":")[2][:30] or said] += 1
        assert not Payload.marker.exists(), f"mutant {n} ran its code"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500 << 10  # kilobytes
    return found


def test_every_seed_loads(seeds, tmp_path):
    for name, seed in seeds.items():
        for container in (npz, safetensors, pytorch):
            random = Random(1)  # neither compressed nor with a payload
            (tmp_path / "weights").write_bytes(container(seed, random))
            assert checkpoint.load(tmp_path / "weights").origin.endswith(f"({name.split()[0]})"), name


def test_300_mutants(seeds, tmp_path, clock):
    found = fuzz(range(300), seeds, tmp_path)
    assert 10 < sum(count for (_, said), count in found.items() if said == "loads") < 200
    assert len(found) > 20


@pytest.mark.slow
@pytest.mark.parametrize("part", range(10))
def test_50_000_mutants(seeds, tmp_path, clock, part):
    begin, found = time.monotonic(), fuzz(range(5000 * part, 5000 * (part + 1)), seeds, tmp_path)
    for container in ("npz", "safetensors", "pytorch"):
        counts = {said: count for (kind, said), count in found.items() if kind == container}
        loads = counts.pop("loads")
        print(f"\n{container}: {loads} load, {sum(counts.values())} are refused in {len(counts)} ways", end="")
    print(f"\n{time.monotonic() - begin:.0f} s", end="")

import os
import random
from pathlib import Path

import jaxtyping
import pytest
import torch
from jaxtyping import install_import_hook
from PIL import Image

# Every test also checks the shapes in the model's signatures.
install_import_hook("vitcli.model", "beartype.beartype")


# Files that take longest begin first, so that the two processes end together.
LONGEST = ("test_commands", "test_readme", "test_processes", "test_resume")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {name: index for index, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONGEST)))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Each test, and what it sets up, draws the same numbers, whichever tests its process ran before."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Golden files, real images and real weights that do not travel with the project."""
    path = Path(os.environ.get("VITCLI_SHARED", Path(__file__).parents[1].parent / "shared"))
    if not path.is_dir():
        pytest.skip(f"golden files and real data are not at {path}; set VITCLI_SHARED to their folder")
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of indexes and shards: of each test its own."""
    place = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("VITCLI_CACHE", str(place))
    return place


@pytest.fixture
def unchecked():
    """Leaves the shapes unchecked: torch.compile cannot trace the checks."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def zygote():
    from zygote import Zygote  # after the import hook

    with Zygote() as zygote:
        yield zygote


@pytest.fixture(scope="session")
def undisturbed(zygote, tmp_path_factory):
    """A run that nothing happens to; changes.txt counts what its saves changed on disk."""
    from zygote import RECIPE

    folder = tmp_path_factory.mktemp("undisturbed")
    said = zygote(folder, *RECIPE, fault=("count_changes", "changes.txt"))
    assert said.code == 0, said.err
    return folder


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """Two classes of 40 small images, which two loader processes read."""
    root, chance = tmp_path_factory.mktemp("photos"), random.Random(0)
    for name in ("train/a", "train/b", "val/a", "val/b"):
        (root / name).mkdir(parents=True)
        for number in range(40):
            image = Image.frombytes("RGB", (12, 12), chance.randbytes(432))
            image.save(root / name / f"{number:02}.png")
    return root

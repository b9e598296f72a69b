"""README holds what it says: each block of the tour runs, and each source file has its line."""

import re
import shlex
from pathlib import Path

import pytest
from command import Vit
from PIL import Image
from sklearn.datasets import load_sample_images

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
TOUR = [line for block in re.findall(r"```bash tour\n(.*?)```", README, re.S) for line in block.splitlines()]


@pytest.fixture
def vit(capsys, monkeypatch) -> Vit:
    return Vit(capsys, monkeypatch)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tour")
    for label, image in zip(("china", "flower"), load_sample_images().images, strict=True):
        (folder / "photos" / label).mkdir(parents=True)
        Image.fromarray(image).save(folder / "photos" / label / "1.jpg")
    Image.fromarray(load_sample_images().images[0]).save(folder / "img.jpg")
    return folder


@pytest.mark.parametrize("line", TOUR)
def test_the_tour(vit, folder, monkeypatch, line):
    monkeypatch.chdir(folder)
    said = vit(*shlex.split(line)[1:])
    assert said.code == 0, said.err
    assert said.out


def test_the_tour_shows_the_five_commands():
    assert {line.split()[1] for line in TOUR} >= {"pretrain", "finetune", "eval", "export", "predict"}


def test_exactly_two_commands_set_up():
    assert re.findall(r"```bash\n(.*?)\n```", README, re.S) == [
        'python -m pip install -e ".[dev]" && vit pretrain recipes/quickstart.yaml',
        "pytest",
    ]


def test_every_file_and_folder_has_its_line():
    files = {f"vitcli/{path.name}" for path in (ROOT / "vitcli").glob("*.py")} - {"vitcli/__init__.py"}
    folders = {f"{path.parent.relative_to(ROOT)}/" for path in (ROOT / "vitcli").glob("*/**/__init__.py")}
    assert set(re.findall(r"^\| `(vitcli/\S+)` \|", README, re.M)) == files | folders


def test_no_traces_of_a_machine():
    for path in [*ROOT.glob("vitcli/**/*.py"), *ROOT.glob("recipes/*.yaml"), ROOT / "README.md"]:
        assert not re.search(r"/work/|/root/|/home/|\.\./shared", path.read_text()), path

"""Every file of a registry's folder offers what the folder promises, and no file of the package runs what it reads."""

import inspect
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import get_type_hints

import pytest

import vitcli
from vitcli import exporters, schema
from vitcli.data.sources import Source
from vitcli.objectives import Objective
from vitcli.weights import Foreign

PACKAGE = Path(vitcli.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
TEXTS = {file.relative_to(PACKAGE).as_posix(): file.read_text() for file in FILES}


def entries(folder: str) -> list:
    """The public files of a folder, each with its module."""
    names = sorted(file.stem for file in (PACKAGE / folder).glob("*.py") if not file.stem.startswith("_"))
    assert names, f"no file in {folder}"
    package = f"vitcli.{folder.replace('/', '.')}"
    return [pytest.param(name, import_module(f"{package}.{name}"), id=name) for name in names]


def defined(module: ModuleType, base: type) -> list[type]:
    """The subclasses of `base` that a module itself defines."""
    classes = [value for value in vars(module).values() if isinstance(value, type) and issubclass(value, base)]
    return [value for value in classes if value.__module__ == module.__name__]


@pytest.mark.parametrize("folder", ["objectives", "data/sources", "weights", "exporters"])
def test_a_registry_is_its_folder(folder):
    found = schema.folder(f"vitcli.{folder.replace('/', '.')}")
    assert found == {entry.values[0]: entry.values[1] for entry in entries(folder)}


@pytest.mark.parametrize(("name", "module"), entries("objectives"))
def test_an_objective_has_its_name_and_losses(name, module):
    (objective,) = defined(module, Objective)
    assert objective.model_fields["name"].default == name
    assert objective.losses is not Objective.losses
    assert schema.kind(objective.model_fields["name"]) == name


@pytest.mark.parametrize(("name", "module"), entries("data/sources"))
def test_a_source_has_its_name_and_opens(name, module):
    (source,) = defined(module, Source)
    assert source.model_fields["name"].default == name
    assert source.open is not Source.open
    assert schema.kind(source.model_fields["name"]) == name


@pytest.mark.parametrize(("name", "module"), entries("weights"))
def test_a_format_of_weights_matches_and_reads(name, module):
    assert schema.folder("vitcli.weights")[name] is module
    assert list(inspect.signature(module.matches).parameters) == ["names"]
    assert list(inspect.signature(module.read).parameters) == ["tensors", "beside"]
    assert module.matches(set()) is False
    assert module.matches({"some.other.weight"}) is False
    assert get_type_hints(module.read)["return"] is Foreign


@pytest.mark.parametrize(("name", "module"), entries("exporters"))
def test_an_exporter_takes_a_model_and_its_own_options(name, module):
    assert exporters.targets()[name] is module
    signature = inspect.signature(module.export)
    (trained, out), options = list(signature.parameters.values())[:2], list(signature.parameters.values())[2:]
    assert (trained.name, trained.annotation, out.name, out.annotation) == ("trained", "Trained", "out", "Path")
    assert signature.return_annotation == "Report"
    assert options[0].name == "images"
    assert ("options" in signature.parameters) == hasattr(module, "OPTIONS")
    for option in options:
        assert option.kind is inspect.Parameter.KEYWORD_ONLY
        assert option.annotation is not inspect.Parameter.empty
        assert option.default is not inspect.Parameter.empty


SECTION = re.compile(r"^class \w+\((Schema|Source|Objective|Preprocessing)\):", re.MULTILINE)


def dotted(file: str) -> str:
    return ".".join(("vitcli", *Path(file).with_suffix("").parts)).removesuffix(".__init__")


def test_recipes_and_their_sections_load_no_torch():
    files = {file for file, text in TEXTS.items() if SECTION.search(text) or Path(file).name == "__init__.py"}
    assert files >= {"model/__init__.py", "optim.py", "runtime.py", "data/sources/folder.py", "objectives/classify.py"}
    modules = sorted(map(dotted, files | {"recipe.py"}))
    program = (
        "import sys\nfrom importlib import import_module\n"
        "for name in sys.argv[1:]:\n"
        "    import_module(name)\n"
        "    assert not {'torch', 'torchvision'} & sys.modules.keys(), name\n"
    )
    ended = subprocess.run([sys.executable, "-c", program, *modules], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


# What would run a file's content, or a shell, with an example that the pattern must find.
FORBIDDEN = {
    r"pickle\.load": "pickle.loads(x)",
    r"^\s*(import|from) pickle\b": "    from pickle import load",
    r"(?<![\w.])eval\(": "x = eval(text)",
    r"(?<![\w.])exec\(": "exec(text)",
    r"shell\s*=\s*True": "run(x, shell=True)",
    r"allow_pickle\s*=\s*True": "np.load(x, allow_pickle=True)",
    r"yaml\.(unsafe_|full_)?load(_all)?\(": "yaml.load(x)",
}


@pytest.mark.parametrize("pattern", FORBIDDEN)
def test_nothing_runs_what_it_reads(pattern):
    found = re.compile(pattern, re.MULTILINE)
    assert found.search(FORBIDDEN[pattern])
    assert not found.search("model.eval()")
    assert [file for file, text in TEXTS.items() if found.search(text)] == []


def test_torch_reads_no_pickle():
    read = re.compile(r"torch\.load\(|^\s*from torch(\.serialization)? import .*\bload\b", re.MULTILINE)
    assert read.search("x = torch.load(path, weights_only=True)")
    assert [file for file, text in TEXTS.items() if read.search(text)] == []

"""Whatever a recipe's bytes are, it loads or ends with RecipeError: one printable line a mistake, in little time."""

import random
import re
import time

import pytest

from vitcli import recipe, recipe_files
from vitcli.errors import RecipeError

TOKENS = (
    *("\t", "\r\n", "\0", "\ufeff", "\x85", "\u2028", "\x1b[31m", "\\U00110000", '"\\ud800"', "é", "\U0001f600"),
    *(
        "&a ",
        "*a",
        "<<: *a",
        "!!python/object/apply:os.system [ls]",
        "!!binary ",
        "! ",
        "? ",
        "| \n",
        "> \n",
        "---\n",
        "...\n",
        "%YAML 1.2\n",
    ),
    *("[", "]", "{", "}", ", ", ": ", "- ", "# ", "'", '"', "\n", "\n  ", " ", "[" * 25, "{a: " * 25, "a: b: c"),
    *(
        "null",
        "~",
        "true",
        "no",
        "012",
        "0o17",
        "1_000",
        "1:30",
        ".nan",
        ".inf",
        "1e999",
        "-1",
        "9" * 40,
        "1e-3",
        "2024-01-01",
        "=",
        "<<",
    ),
    *("name", "source: ", "model: ", "optim: {lr: 1}", "seed", "folder", "digits", "variant: B/16", "x" * 300),
)


def mutate(text: str, other: str, generator: random.Random) -> bytes:
    for _ in range(generator.choice((1, 1, 2, 3))):
        at, to = sorted(generator.randrange(len(text) + 1) for _ in range(2))
        kind = generator.randrange(8)
        if kind == 0:
            text = text[:at] + generator.choice(TOKENS) + text[at:]
        elif kind == 1:
            text = text[:at] + generator.choice(TOKENS) + text[at + generator.randint(1, 8) :]
        elif kind == 2:
            text = text[:at] + text[min(to, at + 30) :]
        elif kind == 3:
            text = text[:at] + other[generator.randrange(len(other)) :]
        elif kind == 4:
            lines = text.split("\n")
            lines.insert(generator.randrange(len(lines)), generator.choice(lines))
            text = "\n".join(lines)
        elif kind > 5:
            numbers = re.findall(r"(?<=[ \[])\d[\d.e-]*", other)
            places = list(re.finditer(r"(?<=[ \[])\d[\d.e-]*", text))
            if numbers and places:
                place = generator.choice(places)
                text = text[: place.start()] + generator.choice(numbers) + text[place.end() :]
        else:
            text = text[:to] + text[at : min(to, at + 40)] * generator.randint(1, 5) + text[to:]
    raw = bytearray(text.encode("utf-8", "surrogatepass"))
    if raw and generator.random() < 0.2:
        raw[generator.randrange(len(raw))] = generator.randrange(256)
    return bytes(raw)


def fuzz(count: int, seed: int, folder) -> tuple[int, float]:
    """How many of `count` mutants load, and the longest CPU time of one."""
    generator, path = random.Random(seed), folder / "mutant.yaml"
    bodies = [text.split("\nmodel", 1)[1] for text in map(recipe_files.text, recipe_files.shipped())]
    bodies = ["model" + body for body in bodies]
    loaded, longest = 0, 0.0
    for _ in range(count):
        path.unlink(missing_ok=True)  # many times faster than to overwrite
        path.write_bytes(mutate(generator.choice(bodies), generator.choice(bodies), generator))
        sets = [generator.choice(TOKENS) + "=" + generator.choice(TOKENS)] if generator.random() < 0.1 else []
        start = time.thread_time()
        try:
            made = recipe.load(path, sets, under={"model": {"variant": "B/16"}})
            assert isinstance(made, recipe.Recipe)
            loaded += 1
        except RecipeError as error:
            text = str(error)
            assert text.replace("\n", "").isprintable(), text
            assert text.count("\n") <= 20, text
            assert all(line for line in text.split("\n")), text
        longest = max(longest, time.thread_time() - start)
    return loaded, longest


def test_5000_mutants_load_or_are_refused(tmp_path):
    loaded, longest = fuzz(5_000, 0, tmp_path)
    assert 50 < loaded < 2_500
    assert longest < 2


@pytest.mark.slow
def test_50000_mutants_load_or_are_refused(tmp_path):
    loaded, longest = fuzz(50_000, 1, tmp_path)
    assert 500 < loaded < 25_000
    assert longest < 2

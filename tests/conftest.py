import os
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

# Every test also checks the shapes in the model's signatures.
install_import_hook("vitcli.model", "beartype.beartype")


@pytest.fixture(scope="session")
def shared() -> Path:
    """Golden files, real images and real weights that do not travel with the project."""
    path = Path(os.environ.get("VITCLI_SHARED", Path(__file__).parents[1].parent / "shared"))
    if not path.is_dir():
        pytest.skip(f"golden files and real data are not at {path}; set VITCLI_SHARED to their folder")
    return path

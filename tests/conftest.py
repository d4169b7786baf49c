"""What every test may use."""

from __future__ import annotations

import os
from pathlib import Path

import hypothesis
import pytest

ROOT = Path(__file__).resolve().parent.parent

# The same examples on every run, and no time limit: the machine may be shared.
hypothesis.settings.register_profile("qgraph", derandomize=True, deadline=None, print_blob=False)
hypothesis.settings.load_profile("qgraph")


@pytest.fixture(scope="session")
def assets() -> Path:
    """Return the folder of real models and data that QGRAPH_ASSETS names; a test that needs it is skipped without."""
    folder = Path(os.environ.get("QGRAPH_ASSETS", ROOT / "../shared/assets")).resolve()
    if not folder.is_dir():
        pytest.skip(f"the real models are not at {folder}; QGRAPH_ASSETS names their folder")
    return folder


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the small network as net.onnx, and samples.npz."""
    import small_network

    folder = tmp_path_factory.mktemp("network")
    small_network.write(folder)
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "assets" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.assets)

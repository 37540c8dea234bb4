from __future__ import annotations

import miniature
import pytest


@pytest.fixture(scope="module")
def paper_environment():
    """Where the scripts of the paper's benchmarks can be imported and run."""
    with miniature.environment():
        yield


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Miniature images in place of Office-Home's, and what its benchmark reads beside them."""
    return miniature.make_photos(tmp_path_factory.mktemp("office_home"))

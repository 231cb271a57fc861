"""What the tests of trainings share."""

import pytest
from run_samples import write_images


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("photos"))

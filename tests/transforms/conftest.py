"""What the tests of views share."""

import pytest

from crosslevel.transforms import parameters


@pytest.fixture(params=[True, False], ids=["in small parts", "all at once"])
def way(request):
    """As a CPU makes views, and as a GPU does: all that are drawn alike in one go."""
    with parameters.in_pieces(request.param):
        yield

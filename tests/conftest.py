import pytest

from datasets.synthetic import render_dota


@pytest.fixture(scope="session")
def dota_root(tmp_path_factory):
    """A small synthetic data set in DoTA's layout: 8 training and 5 validation clips of 96 x 54 pixels, zipped."""
    root = tmp_path_factory.mktemp("dota")
    render_dota(root, train=8, val=5, seed=1, size=(96, 54))
    return root

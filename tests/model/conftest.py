import pytest

from hf_hyla.model import ops_cpu_hyla


@pytest.fixture
def one_size_of_tiles(monkeypatch):
    """The largest tiles of the CPU kernel for any number of keys, since a kernel takes seconds to compile for each size."""
    monkeypatch.setattr(ops_cpu_hyla, "_TILES", ())

"""Eight CPU devices, of which the training loop finds one unless a test asks for more; compiled programs are kept."""

import gc
import getpass
import logging
import os
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The tests compile a thousand programs and run each a few times: code that is made quickly, here and in their children.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_backend_optimization_level=0 --xla_cpu_opt_preset=FAST_COMPILE --xla_cpu_use_fusion_emitters=false"
    + " --xla_cpu_parallel_codegen_split_count=1"
)

import jax
import pytest

from jaxsd import tuning
from jaxsd.models.conv import plain_convolutions

jax.config.update("jax_num_cpu_devices", 8)
CACHE = Path(tempfile.gettempdir(), f"jaxsd-tests-{getpass.getuser()}")
tuning.cache_compilation(CACHE)
KEPT_SECONDS = 0.1  # programs that are compiled faster are not kept: writing them takes as long


def pytest_collection_finish():
    """What has been imported stays: the garbage collector, which a heap of traced programs keeps busy, passes it by."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


@pytest.fixture(autouse=True)
def devices(monkeypatch):
    """Sets how many devices the training loop finds: 1 at first."""

    def use(count):
        monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:count])

    use(1)
    return use


@pytest.fixture(autouse=True)
def as_at_first():
    """What a whole run in an earlier test has set: the log apart from the root, small programs kept too."""
    logging.getLogger("jaxsd").propagate = True
    jax.config.update("jax_persistent_cache_min_compile_time_secs", KEPT_SECONDS)


@pytest.fixture
def plain():
    """XLA's own convolutions, which compile in a tenth of the time; tests/test_conv.py holds ours against them."""
    with plain_convolutions():
        yield

"""Several processes that train as one, on one machine or many; with a single process everything here does nothing.

Process 0 leads. It alone reads and writes the workdir, measures and reports, as a single process would. The others load
the same data, wait for the name of the next run, train it in step with process 0 and end when it ends. What crosses
between processes is each run's first state, the gradients, and whether a signal has asked to stop.
"""

import ctypes
import functools
import itertools
import os
import signal
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from jaxsd.errors import UserError

Tree = Any
SILENCE = 30  # seconds after which a process that is not heard of counts as lost
LOST = "another process has ended or cannot be reached; the same command, for all of them, goes on where they were"
OWN = ("RESOURCE_EXHAUSTED", "INVALID_ARGUMENT", "UNIMPLEMENTED", "NOT_FOUND", "FAILED_PRECONDITION")  # not others' end
POLL = 2000  # milliseconds of waiting for a word at once, in which signals are not seen
HEARD = 3  # seconds in which who listens has heard a word

_words = itertools.count()  # numbers what process 0 says; every process counts for itself


def start(coordinator: str | None = None, count: int | None = None, index: int | None = None) -> None:
    """Joins the other processes. Comes before anything that asks JAX for its devices.

    coordinator: HOST:PORT of process 0; count: how many processes there are; index: which one this is. Without these
    JAX finds them itself under SLURM, Open MPI, Kubernetes and on TPU VMs.
    Raises UserError where they are wrong or cannot be found. A process that loses the others later ends with one line
    and status 1.
    """
    _end_plainly()
    try:
        jax.distributed.initialize(
            coordinator, count, index, heartbeat_timeout_seconds=SILENCE, shutdown_timeout_seconds=SILENCE
        )
    except (ValueError, TypeError) as error:
        raise UserError(
            f"the processes do not find each other ({error}): --distributed is for SLURM, Open MPI and TPU VMs; "
            "elsewhere give --coordinator=HOST:PORT --processes=N --process=I, I from 0 to N - 1"
        ) from error


def _end_plainly() -> None:
    """Gives the end by SIGABRT, JAX's way of ending a process that has lost the others, a clear line and status 1.

    The handler is C's own: at an abort Python's would never get to run.
    """
    line = f"error: {LOST}\n".encode()

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def end(number: int) -> None:
        os.write(2, line)
        os._exit(1)

    _end_plainly.kept = end  # type: ignore[attr-defined]  # C holds no reference
    ctypes.CDLL(None).signal(signal.SIGABRT, end)


def several() -> bool:
    """Whether there is more than this process."""
    return jax.process_count() > 1


def leads() -> bool:
    """Whether this process reads and writes the workdir, measures and reports."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def say(word: str) -> None:
    """Process 0: tells the others; they hear words in order."""
    if several():
        _client().key_value_set(f"jaxsd/{next(_words)}", word)


def hear() -> str:
    """The others: waits for the next word of process 0, however long."""
    name = f"jaxsd/{next(_words)}"
    while True:
        try:
            return _client().blocking_key_value_get(name, POLL)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise


def is_lost(error: Exception) -> bool:
    """Whether an error most likely says that other processes have ended."""
    if not several() or not isinstance(error, jax.errors.JaxRuntimeError):
        return False
    # On CPUs what Gloo says comes as the failure of the program that waited for it, whatever its code.
    return "Gloo" in str(error) or not any(code in str(error) for code in OWN)


def _client() -> Any:
    # A collective would do for words too, but a process that waits in one sees no signal and keeps a device busy. JAX
    # has no public door to its key-value store; Orbax takes the same one.
    from jax._src.distributed import global_state

    return global_state.client


def mesh(batch_size: int) -> Mesh:
    """A mesh with the one axis `data` over equally many devices of each process, as many as divide the batch.

    Raises UserError where the batch cannot be split over the processes.
    """
    count = jax.process_count()
    if batch_size % count:
        raise UserError(
            f"batches of {batch_size} cannot be split over {count} processes: set batch_size to a multiple of {count} "
            "(of few images a batch holds no more than all of them), or take fewer processes"
        )
    of = [[device for device in jax.devices() if device.process_index == index] for index in range(count)]
    each = next(n for n in range(min(map(len, of)), 0, -1) if batch_size % (n * count) == 0)
    return Mesh(np.array([device for devices in of for device in devices[:each]]), ("data",))


def put(tree: Tree, sharding: Sharding) -> Tree:
    """Puts arrays that are the same in every process on the devices of all."""

    def one(leaf: Any) -> jax.Array:
        if isinstance(leaf, jax.Array) and leaf.sharding == sharding:
            return leaf
        values, typed = _values(leaf)
        made = jax.make_array_from_callback(values.shape, sharding, lambda part: values[part])
        return jax.random.wrap_key_data(made) if typed else made

    return jax.tree.map(one, tree)


def local(tree: Tree) -> Tree:
    """What lies on the devices of all processes, as arrays of this process; no copies."""
    return jax.tree.map(lambda x: x if x.is_fully_addressable else x.addressable_data(0), tree)


def host(tree: Tree) -> Tree:
    """Copies in numpy arrays, without typed keys."""
    return jax.tree.map(lambda leaf: np.array(_values(leaf)[0]), tree)


def _values(leaf: Any) -> tuple[np.ndarray, bool]:
    """A leaf's numbers, and whether they are those of a key."""
    typed = isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if typed else leaf), typed


def share(tree: Tree) -> Tree:
    """Process 0's values for every process, bit for bit; arrays of the same shapes and types in all of them."""
    if not several():
        return tree
    leaves, structure = jax.tree.flatten(tree)
    parts = [_values(leaf) for leaf in leaves]
    # As bytes in one piece: a sum of floats, which is how the values travel, would lose the sign of a zero.
    text = np.concatenate([np.ascontiguousarray(part).reshape(-1).view(np.uint8) for part, _ in parts])
    text = np.asarray(multihost_utils.broadcast_one_to_all(text))
    ends = np.cumsum([part.nbytes for part, _ in parts])
    shared = [
        _like(leaf, np.frombuffer(text[end - part.nbytes : end].tobytes(), part.dtype).reshape(part.shape), typed)
        for leaf, end, (part, typed) in zip(leaves, ends, parts, strict=True)
    ]
    return jax.tree.unflatten(structure, shared)


def _like(leaf: Any, values: np.ndarray, typed: bool) -> Any:
    """Values as an array of the leaf's kind."""
    if not isinstance(leaf, jax.Array):
        return values
    return jax.random.wrap_key_data(jnp.asarray(values)) if typed else jnp.asarray(values)


def greatest(value: int) -> jax.Array:
    """The greatest of the processes' values; all ask at the same moment. The answer may still be on its way."""
    values, function = _comparison(value)
    return function(values)


@functools.lru_cache
def _comparison(value: int) -> tuple[jax.Array, Callable[[jax.Array], jax.Array]]:
    devices = np.array(jax.devices())
    everywhere = Mesh(devices, ("data",))
    own = np.full(len(jax.local_devices()), value, np.int32)
    split = NamedSharding(everywhere, PartitionSpec("data"))
    values = jax.make_array_from_process_local_data(split, own, (len(devices),))
    return values, _greatest(NamedSharding(everywhere, PartitionSpec()))


@functools.lru_cache
def _greatest(sharding: NamedSharding) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(jnp.max, out_shardings=sharding)

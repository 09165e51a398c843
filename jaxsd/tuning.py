"""Settings of the process, applied by the command line and never on import."""

import ctypes
import functools
import hashlib
import os
import platform
from pathlib import Path


def tune_allocator() -> None:
    """Keeps freed memory with the process (glibc only): XLA on CPU takes fresh buffers for every call."""
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(-8, 1)  # M_ARENA_MAX: XLA's threads share the main heap
    libc.mallopt(-4, 0)  # M_MMAP_MAX: no separate mapping per block
    libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: freed memory is kept, however much
    libc.mallopt(-2, 256 << 20)  # M_TOP_PAD


@functools.cache
def compiler_options(*, short: bool = False) -> dict[str, str | int]:
    """What `jax.jit(compiler_options=)` is given for networks: on a CPU, that `optimization_barrier` is kept.

    XLA there removes barriers before it fuses, and then computes whole residual streams again inside of what reads
    them. `short`: for a program that has little to do, which is compiled in a third of the time and runs several times
    slower. These names are no stable interface: where this jaxlib does not take the options there are none.
    """
    import jax

    if jax.default_backend() != "cpu":
        return {}
    options: dict[str, str | int] = {"xla_disable_hlo_passes": "cse_barrier_expander"}
    if short:
        options |= {
            "xla_backend_optimization_level": 0,
            "xla_cpu_use_fusion_emitters": False,
            "xla_cpu_parallel_codegen_split_count": 1,
        }
    try:
        jax.jit(lambda x: x, compiler_options=options).lower(0.0).compile()
    except Exception:  # whatever a compiler of another version says
        return compiler_options() if short else {}
    return options


def cache_compilation(folder: Path | None = None) -> Path:
    """Keeps compiled programs on disk, apart for each kind of processor; returns the folder.

    Code compiled for one processor may not run on another that shares a home directory, so the folder is named after
    the machine's features.
    """
    import jax

    root = Path(folder or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        features = platform.processor()
    machine = hashlib.sha256(f"{platform.machine()} {features}".encode()).hexdigest()[:12]
    path = root / "jaxsd" / "compiled" / machine
    path.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return path

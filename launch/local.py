"""Starts N processes on this machine that train one thing together: python launch/local.py N --config=... [FLAGS]

One process can use all devices of a machine, so this is for trying out what runs on several machines. Without GPUs give
each process some of the cores: JAX_NUM_CPU_DEVICES=2 python launch/local.py 2 --config=configs/scalenet.py:tiny
Signals go to all of them. Exit status: that of process 0, or of the first other that failed.
"""

import signal
import socket
import subprocess
import sys


def main(argv: list[str]) -> int:
    """Starts the processes and waits for all."""
    if not argv or not argv[0].isdigit() or int(argv[0]) < 1:
        print(f"error: the number of processes comes first\n\n{__doc__}", file=sys.stderr)
        return 2
    count, flags = int(argv[0]), argv[1:]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "jaxsd.main", *flags, f"--coordinator={address}", f"--processes={count}"]
    # In sessions of their own: Ctrl-C reaches them once, through here.
    children = [subprocess.Popen([*command, f"--process={i}"], start_new_session=True) for i in range(count)]
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: [child.send_signal(number) for child in children])
    statuses = [child.wait() for child in children]
    return next((128 - status if status < 0 else status for status in statuses if status), 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

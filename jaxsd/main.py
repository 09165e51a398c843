"""`python -m jaxsd.main --config=configs/NAME.py[:PRESET]`: trains what a config compares and prints the table.

Exit status: 0 done, 1 failed while running, 2 wrong use (flag, config, data), 128 + n stopped by signal n after saving.
"""

import difflib
import logging
import os
import re
import shlex
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

CONFIG_HELP = "config file, with a preset after a colon: configs/scalenet.py:folder"
OVERRIDES = """  --config.KEY=VALUE overrides a value: --config.stages.finetune.epochs=40
              --config.seeds='(0,1,2)' are three seeds; --config.seeds=3 is one, the seed 3
              --config.stages.finetune.optimiser.name=adamw also drops the arguments that only sgd has
  The keys and values of a config: python -m jaxsd.main --config=configs/scalenet.py:tiny --print"""

NAMES = ("config", "workdir", "only", "reuse", "print", "tune", "distributed", "coordinator", "processes", "process")


def defined(argv: list[str]) -> flags.FlagValues:
    """The flags that there are, not parsed yet."""
    values = flags.FlagValues()
    # Options that a config does not name may be given too, see `_check_overrides`.
    config_flags.DEFINE_config_file(
        "config", None, CONFIG_HELP, values, lock_config=False, accept_new_attributes=True, sys_argv=argv
    )
    where = "where to write; default runs/NAME or runs/NAME-PRESET"
    flags.DEFINE_string("workdir", None, where, flag_values=values)
    flags.DEFINE_list("only", [], "arms to train, separated by commas; default all", flag_values=values)
    again = "keep the stages of the workdir that match the config and train the others again"
    flags.DEFINE_bool("reuse", False, again, flag_values=values)
    shown = "print the keys and values of the config, as flags that can be given, and stop"
    flags.DEFINE_bool("print", False, shown, flag_values=values)
    kept = "keep freed memory for this process, which is faster on CPUs; --notune leaves the allocator as it is"
    flags.DEFINE_bool("tune", True, kept, flag_values=values)
    job = "train with the other processes of this SLURM, Open MPI or TPU VM job"
    flags.DEFINE_bool("distributed", False, job, flag_values=values)
    flags.DEFINE_string("coordinator", None, "train with other processes: HOST:PORT of process 0", flag_values=values)
    flags.DEFINE_integer("processes", None, "how many processes there are", flag_values=values)
    flags.DEFINE_integer("process", None, "which of them this is, from 0", flag_values=values)
    return values


def main(argv: list[str]) -> int:
    """Runs the command line; returns the exit status."""
    if any(flag in ("-h", "-help", "--help") for flag in argv[1:]):
        print(usage())
        return 0
    try:
        config, given = read(argv)
        if given.print:
            print("\n".join(as_flags(config)))
            return 0
        several = given.distributed or (given.coordinator, given.processes, given.process) != (None, None, None)
        return (together if several else run)(config, given)
    except Exception as error:
        return _failed(error)


def together(config: dict[str, Any], given: flags.FlagValues) -> int:
    """`run` as one of several processes, which all end with the status of process 0."""
    from jaxsd import processes  # loads jax
    from jaxsd.errors import RunError

    processes.start(given.coordinator, given.processes, given.process)
    alone = False
    try:
        status = run(config, given)
    except Exception as error:
        lost = processes.is_lost(error)
        status = _failed(RunError(f"{processes.LOST} ({error})") if lost else error)
        # The others are told, unless they are what is missing; a process that fails alone tells by ending.
        alone = lost or not processes.leads()
    if processes.leads() and not alone:
        processes.say(f"end {status}")
    if alone or status in (1, 2):
        # JAX's own way to end waits for all, but of those that a failure leaves behind some wait for this one.
        if not alone and processes.leads():
            time.sleep(processes.HEARD)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def usage() -> str:
    """What --help prints."""
    values = defined([])
    lines = [f"  --{name:12}{values[name].help}" for name in NAMES]
    return f"{__doc__}\n" + "\n".join([*lines, OVERRIDES])


def _failed(error: Exception) -> int:
    """Says on one line what went wrong; returns the exit status."""
    from jaxsd.errors import RunError, Stopped, UserError

    if isinstance(error, Stopped):
        print(f"jaxsd: {error}", file=sys.stderr)
        return 128 + error.signal
    text = str(error)
    if isinstance(error, OSError):  # of the machine: a full disk, a folder that is gone or may not be written
        what = f"{error.filename or 'writing to the workdir'}: {error.strerror or error}"
        text = f"{what}; once that is mended the same command goes on from what is saved"
    elif not isinstance(error, UserError | RunError | flags.Error):
        # The line is for people; the traceback is in the log.
        text = f"{type(error).__name__}: {error}; the traceback is in log.txt of the workdir"
    logging.getLogger("jaxsd").debug("%s", traceback.format_exc())
    print(f"error: {' '.join(text.split())}", file=sys.stderr)
    return 2 if isinstance(error, UserError | flags.Error) else 1


def parse(argv: list[str]) -> dict[str, Any]:
    """The config as a plain dict, with overrides from the command line; UserError for anything that does not fit."""
    return read(argv)[0]


def read(argv: list[str]) -> tuple[dict[str, Any], flags.FlagValues]:
    """The config as a plain dict, with overrides from the command line, and the other flags.

    Raises UserError for anything that does not fit.
    """
    from jaxsd.errors import UserError

    path = _config_path(argv)
    if path is None:
        raise UserError("--config is missing: for example --config=configs/scalenet.py")
    given = path.split(":")[0]
    if not Path(given).is_file():
        raise UserError(f"--config: there is no file {given} in {Path.cwd()}: give its path, as configs/scalenet.py")
    try:
        alone = defined(argv[:1])
        alone([argv[0], f"--config={path}"])
        _check_overrides(argv, plain(alone.config))
        values = defined(argv)
        rest = values(argv)
        config = plain(values.config)
        _drop_former(config, plain(alone.config), argv)
    except UserError:
        raise
    except flags.Error as error:
        if unset := re.match(r"Type <class 'NoneType'> of field (\S+) is not supported", str(error)):
            raise UserError(f"--{unset[1]} cannot be set by a flag: set it in the config file") from error
        # What a config file raises arrives as the text of a traceback; its last line says what is wrong.
        raise UserError(str(error).strip().splitlines()[-1].removeprefix("ValueError: ")) from error
    except (TypeError, ValueError) as error:
        raise UserError(f"--config: {error}") from error
    except Exception as error:  # a config file is a program, which can raise anything
        raise UserError(f"--config: {path} cannot be loaded ({type(error).__name__}: {error})") from error
    if len(rest) > 1:
        raise UserError(f"{rest[1]!r} is no flag: every option starts with --")
    return config, values


def _check_overrides(argv: list[str], config: dict[str, Any]) -> None:
    """Raises UserError for a flag --config.KEY of a key that is not in the config, with the keys that are.

    Further arguments of what has a `name` (a network, an optimiser) pass: `build` knows which there are.
    """
    from jaxsd.errors import UserError

    for flag in argv[1:]:
        found = re.match(r"--?(?:no)?config\.([^=]+)", flag)
        value, place = config, "--config"
        parts = re.findall(r"[^.\[\]]+", found[1]) if found else []
        for part in parts:
            if isinstance(value, tuple):
                if not part.isdigit() or int(part) >= len(value):
                    raise UserError(f"{place} has no entry {part!r}: its {len(value)} entries are {place}[0], ...")
                value, place = value[int(part)], f"{place}[{part}]"
                continue
            if not isinstance(value, dict):
                raise UserError(f"{place} has no keys, so no {part!r}: its value is {value!r}")
            if part not in value and value is not config and "name" in value and part is parts[-1]:
                break
            if part not in value:
                near = difflib.get_close_matches(part, value, 1)
                mean = f'Did you mean "{near[0]}"? ' if near else ""
                raise UserError(f"{place} has no key {part!r}. {mean}Its keys are {', '.join(value)}")
            value, place = value[part], f"{place}.{part}"


def _drop_former(config: dict[str, Any], before: dict[str, Any], argv: list[str]) -> None:
    """Where flags give a network, an optimiser or the like another name, drops arguments that the new one lacks.

    Arguments that are given by flags themselves stay.
    """
    keys = [found[1] for flag in argv[1:] if (found := re.match(r"--?config\.([^=\[\]]+)", flag))]
    for key in keys:
        *path, last = key.split(".")
        new, old = _at(config, path), _at(before, path)
        if last != "name" or not path or not isinstance(old, dict) or old.get("name") == new["name"]:
            continue
        from jaxsd import build  # loads jax

        kept = ("name", *build.takes(config, tuple(path)))
        given = {other.rsplit(".", 1)[1] for other in keys if other.startswith(f"{'.'.join(path)}.")}
        for name in [name for name in new if name not in kept and name not in given]:
            del new[name]


def _at(config: Any, path: list[str]) -> Any:
    for key in path:
        config = config[key]
    return config


def _config_path(argv: list[str]) -> str | None:
    """What --config is given, as one word with the flag or as the next."""
    for flag, following in zip(argv[1:], [*argv[2:], ""], strict=True):
        name, equals, value = flag.partition("=")
        if name in ("-config", "--config"):
            return value if equals else following
    return None


def as_flags(config: dict[str, Any], key: str = "--config") -> list[str]:
    """The values of a config, each as a flag that sets it, quoted for the shell; what is not set as a comment."""
    lines = []
    for name, value in config.items():
        if isinstance(value, dict) and value:
            lines += as_flags(value, f"{key}.{name}")
        elif value is None or value == {}:
            lines.append(f"# {key}.{name} is not set")
        else:
            lines.append(f"{key}.{name}={_quoted(value if isinstance(value, str) else repr(value))}")
    return lines


def _quoted(text: str) -> str:
    """A word for the shell: within double quotes where it holds single ones, which reads better than shlex's way."""
    plainly = "'" in text and not set(text) & set('"$`\\!')
    return f'"{text}"' if plainly else shlex.quote(text)


def plain(config: Any) -> Any:
    """A ConfigDict as dicts, tuples and scalars."""
    if hasattr(config, "to_dict"):
        config = config.to_dict()
    if isinstance(config, dict):
        return {name: plain(value) for name, value in config.items()}
    return tuple(plain(value) for value in config) if isinstance(config, list | tuple) else config


def run(config: dict[str, Any], given: flags.FlagValues) -> int:
    """Loads, trains what is missing, measures, writes summary.json and prints the table; returns the exit status."""
    from jaxsd import build, command, tuning

    build.recipe(config)  # wrong configs are found before any data are read
    if given.tune:
        tuning.tune_allocator()
    name = config["name"] + (f"-{config['preset']}" if config["preset"] else "")
    workdir, only = Path(given.workdir or Path("runs") / name), tuple(given.only)
    stop = command.stop_on_signals((signal.SIGINT, signal.SIGTERM))
    return command.run(config, workdir, only=only, reuse=given.reuse, stop=stop)


if __name__ == "__main__":
    sys.exit(main(sys.argv))

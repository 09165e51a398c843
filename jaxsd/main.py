"""`python -m jaxsd.main --config=configs/NAME.py[:PRESET]`: trains what a config compares and prints the table.

Exit status: 0 done, 1 failed while running, 2 wrong use (flag, config, data), 128 + n stopped by signal n after saving.
"""

import signal
import sys
import traceback
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

FLAGS = flags.FLAGS
# Keys that a config does not name may be given too (options of its network, for one): `build` knows which there are.
CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "config file, with a preset after a colon: configs/scalenet.py:folder",
    lock_config=False,
    accept_new_attributes=True,
)
flags.DEFINE_string("workdir", None, "where to write; default runs/NAME or runs/NAME-PRESET")
flags.DEFINE_list("only", [], "arms to train, separated by commas; default all")
flags.DEFINE_bool("reuse", False, "keep the stages of the workdir that match the config and train the others again")


def main(argv: list[str]) -> int:
    """Runs the command line; returns the exit status."""
    from jaxsd.errors import RunError, Stopped, UserError  # cheap; jax comes later, so that --help is fast

    if any(flag in ("-h", "-help", "--help") for flag in argv[1:]):
        print(usage())
        return 0
    try:
        config = parse(argv)
        run(config, FLAGS.workdir, tuple(FLAGS.only), FLAGS.reuse)
        return 0
    except Stopped as stopped:
        print(f"jaxsd: {stopped}", file=sys.stderr)
        return 128 + stopped.signal
    except (UserError, flags.Error) as error:
        return _failed(error, 2)
    except RunError as error:
        return _failed(error, 1)
    except Exception as error:  # one line is for people; the traceback is in the log
        return _failed(f"{type(error).__name__}: {error}; the traceback is in log.txt of the workdir", 1)


def usage() -> str:
    """What --help prints."""
    lines = [f"  --{name:10}{FLAGS[name].help}" for name in ("config", "workdir", "only", "reuse")]
    lines.append("  --config.KEY=VALUE overrides a value: --config.seeds='(0,1)' --config.stages.finetune.epochs=40")
    return f"{__doc__}\n" + "\n".join(lines)


def _failed(error: Exception | str, status: int) -> int:
    import logging

    logging.getLogger("jaxsd").debug("%s", traceback.format_exc())
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return status


def parse(argv: list[str]) -> dict[str, Any]:
    """The config as a plain dict, with overrides from the command line; UserError for anything that does not fit."""
    from jaxsd.errors import UserError

    for flag in argv[1:]:
        name, _, value = flag.partition("=")
        if name.lstrip("-") == "config" and value and not Path(value.split(":")[0]).is_file():
            raise UserError(
                f"--config: there is no file {value.split(':')[0]}: for example --config=configs/scalenet.py"
            )
    try:
        rest = FLAGS(argv)
        config = CONFIG.value
    except flags.Error as error:
        # What a config file raises arrives as the text of a traceback; its last line says what is wrong.
        raise UserError(str(error).strip().splitlines()[-1].removeprefix("ValueError: ")) from error
    except (AttributeError, KeyError) as error:  # an override of a key that is not there
        text = str(error).strip("'\"").replace("\\n", " ").replace("\\'", "'")
        raise UserError(f"--config: there is no key {text}") from error
    except (TypeError, ValueError) as error:
        raise UserError(f"--config: {error}") from error
    if len(rest) > 1:
        raise UserError(f"{rest[1]!r} is no flag: every option starts with --")
    if config is None:
        raise UserError("--config is missing: for example --config=configs/scalenet.py")
    return plain(config)


def plain(config: Any) -> Any:
    """A ConfigDict as dicts, tuples and scalars."""
    if hasattr(config, "to_dict"):
        config = config.to_dict()
    if isinstance(config, dict):
        return {name: plain(value) for name, value in config.items()}
    return tuple(plain(value) for value in config) if isinstance(config, list | tuple) else config


def run(config: dict[str, Any], workdir: str | None, only: tuple[str, ...], reuse: bool) -> dict[str, Any]:
    """Loads, trains what is missing, measures, writes summary.json and prints the table; returns the summary."""
    from jaxsd import build, command

    build.recipe(config)  # wrong configs are found before any data are read
    name = config["name"] + (f"-{config['preset']}" if config["preset"] else "")
    stop = command.stop_on_signals((signal.SIGINT, signal.SIGTERM))
    return command.run(config, Path(workdir or Path("runs") / name), only=only, reuse=reuse, stop=stop)


if __name__ == "__main__":
    sys.exit(main(sys.argv))

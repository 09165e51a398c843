"""Functions by name: a spec {"name", **arguments} against a table of functions and their signatures.

Whatever does not fit is a UserError that lists what would, nearest first.
"""

import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from jaxsd.errors import UserError

Config = Mapping[str, Any]


def arguments(spec: Config) -> dict[str, Any]:
    """All of a spec but the name."""
    return {k: v for k, v in spec.items() if k != "name"}


def call(table: Mapping[str, Callable], spec: Config, what: str) -> Any:
    """Calls the function that a spec {"name", **arguments} names; UserError where the arguments do not fit it."""
    function, given = check_call(table, spec, what)
    return function(**given)


def check_call(table: Mapping[str, Callable], spec: Config, what: str) -> tuple[Callable, dict[str, Any]]:
    """The function that a spec names and its arguments, once they fit each other."""
    if not isinstance(spec, Mapping) or "name" not in spec:
        raise UserError(f"{what}: {spec!r} is no dict(name=..., ...): choose a name from {', '.join(table)}")
    function, given = pick(table, spec["name"], what), arguments(spec)
    check(function, given, f"{what} {spec['name']!r}")
    return function, given


def pick(table: Mapping[str, Any], name: str, what: str) -> Any:
    """What stands in a table under a name; `what` says in messages where the name was given."""
    if name not in table:
        near = difflib.get_close_matches(str(name), table, len(table), 0)
        raise UserError(f"{what}: {name!r} is unknown: choose from {', '.join(near)}")
    return table[name]


def check_keys(part: Config, known: tuple[str, ...], where: str) -> None:
    """Raises UserError for a key of a part of the config that is none of those known."""
    for name in part:
        pick(dict.fromkeys(known), name, f"{where}: key")


def check_known(function: Callable, arguments: Config, where: str, given: tuple[str, ...] = ()) -> dict[str, Any]:
    """The parameters of a function but those `given`; UserError where an argument is none of them."""
    parameters = {k: p for k, p in inspect.signature(function).parameters.items() if k not in given}
    for name in arguments:
        pick(parameters, name, f"{where}: argument")
    return parameters


def check(function: Callable, arguments: Config, where: str, given: tuple[str, ...] = ()) -> None:
    """Raises UserError where an argument is unknown to a function, or one is missing that it needs."""
    parameters = check_known(function, arguments, where, given)
    for name, parameter in parameters.items():
        if parameter.default is parameter.empty and arguments.get(name) is None:
            key = where.split()[0]
            raise UserError(
                f"{where} needs {name}: --config.{key}.{name}=..." if key == "data" else f"{where} needs {name}"
            )

"""A reward function of a user's own: found by name, called as TRL's GRPOTrainer calls one, its answer checked."""

from __future__ import annotations

import asyncio
import hashlib
import importlib
import importlib.util
import inspect
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from qzo.errors import QzoError, is_failure
from qzo.files.folder import one_line
from qzo.regular import check_regular

MOST_MIB = 16  # of a source file
GIVEN = ("prompts", "completions", "completion_ids")  # what a function gets beside the columns of the rows
OF_A_TRAINER = ("log_extra", "log_metric")  # functions of TRL's trainer that a reward may call; here they do nothing
Texts = Sequence[Any]  # strings, or lists of messages


@dataclass(frozen=True)
class RewardFunction:
    """A reward function with its name and where it came from.

    Args:
        call: `call(prompts=..., completions=..., completion_ids=..., **columns) -> list[float]`; what it does not name,
            and takes no `**kwargs` for, it is not given. May be a coroutine function.
        name: for errors.
        source: its file; None where there is none to be found.
    """

    call: Callable[..., Any]
    name: str
    source: str | None = None

    @property
    def digest(self) -> str | None:
        """SHA-256 of its source file; modules that it imports are not in it. Raises QzoError."""
        if self.source is None:
            return None
        check_regular(Path(self.source), MOST_MIB)
        return hashlib.sha256(Path(self.source).read_bytes()).hexdigest()

    def check_columns(self, columns: Sequence[str]) -> None:
        """Raise QzoError where it cannot be called with these columns."""
        try:
            signature = inspect.signature(self.call)
        except (TypeError, ValueError):  # of a builtin; the call will tell
            return
        arguments = dict.fromkeys((*GIVEN, *OF_A_TRAINER, *columns))
        missing = [
            name
            for name, parameter in signature.parameters.items()
            if name not in arguments
            and parameter.default is parameter.empty
            and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        ]
        if missing:
            raise QzoError(
                f"{self.name} wants {missing[0]}, and the rows have no such column: they have "
                f"{', '.join(columns) or 'none'} beside the prompt; name the column so, or give the argument a default"
            )
        if any(parameter.kind is parameter.POSITIONAL_ONLY for parameter in signature.parameters.values()):
            raise QzoError(
                f"{self.name} takes arguments by position alone, and rewards are given theirs by name; remove the / "
                "from its signature"
            )

    def rewards(
        self,
        prompts: Texts,
        completions: Texts,
        ids: Sequence[list[int]],
        columns: Mapping[str, list[Any]],
        rows: Sequence[str],
    ) -> list[float]:
        """One finite number for each completion.

        Args:
            prompts, completions: text, or messages.
            ids: tokens of each completion.
            columns: name -> a value for each completion.
            rows: where the row of each stands, for errors.

        Raises QzoError, with the row, for an exception in the function, and for anything but such numbers.
        """
        given = {"prompts": prompts, "completions": completions, "completion_ids": ids, **columns}
        try:
            found = self._called(given)
        except QzoError:
            raise
        except BaseException as error:  # what a user's function raises
            if not is_failure(error):
                raise
            where = self._blamed(given, rows)
            raise QzoError(
                f"{where}: {self.name} raised {_told(error, self.source)}; correct the function, or the row"
            ) from error
        return [self._number(value, where) for value, where in zip(self._listed(found, len(rows)), rows, strict=True)]

    def _called(self, given: Mapping[str, Any]) -> Any:
        found = self.call(**self._taken(given))
        return asyncio.run(found) if inspect.iscoroutine(found) else found

    def _taken(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments that the function takes."""
        arguments = {**dict.fromkeys(OF_A_TRAINER, _nothing), **given}
        try:
            parameters = inspect.signature(self.call).parameters.values()
        except (TypeError, ValueError):
            return arguments
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            return arguments
        names = {parameter.name for parameter in parameters}
        return {name: value for name, value in arguments.items() if name in names}

    def _blamed(self, given: Mapping[str, Any], rows: Sequence[str]) -> str:
        """The first row with which alone the function fails too, else the first of all."""
        for number, where in enumerate(rows):
            try:
                self._called({name: values[number : number + 1] for name, values in given.items()})
            except Exception:
                return str(where)
        return f"{rows[0]} and {len(rows) - 1} more" if len(rows) > 1 else str(rows[0])

    def _listed(self, found: Any, count: int) -> list[Any]:
        if isinstance(found, str | bytes | Mapping) or not hasattr(found, "__len__") or not hasattr(found, "__iter__"):
            raise QzoError(f"{self.name} returned {_shown(found)}; it must return a list of {count} numbers")
        values = list(found)
        if len(values) != count:
            raise QzoError(
                f"{self.name} returned {len(values)} numbers for {count} completions; it must return one for each"
            )
        return values

    def _number(self, value: Any, where: Any) -> float:
        try:
            number = math.nan if isinstance(value, str | bytes) else float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number):
            raise QzoError(f"{where}: {self.name} returned {_shown(value)}; a reward must be a finite number")
        return number


def load_function(name: str) -> RewardFunction:
    """The function that `MODULE:FUNCTION` names: a module that can be imported from here, or the path of a .py file.

    The module is run. Raises QzoError, in one line, for whatever keeps a function from being found.
    """
    module_name, colon, attribute = name.rpartition(":")
    if not (colon and module_name and attribute):
        raise QzoError(f'reward="{name}" is not MODULE:FUNCTION; give e.g. score.py:brevity')
    module = _from_file(Path(module_name), name) if module_name.endswith(".py") else _imported(module_name, name)
    call: Any = module
    for part in attribute.split("."):
        call = getattr(call, part, None)
    if not callable(call):
        functions = [key for key, value in vars(module).items() if inspect.isfunction(value) and key[0] != "_"]
        raise QzoError(
            f"{module_name} has no function {attribute}; it has "
            f"{', '.join(functions[:10]) or 'no functions at all'}: name one, or add it"
        )
    return RewardFunction(call, name, getattr(module, "__file__", None))


def as_function(reward: str | Callable[..., Any] | RewardFunction) -> RewardFunction:
    """A function by its name, or one that is at hand. Raises QzoError."""
    if isinstance(reward, RewardFunction):
        return reward
    if isinstance(reward, str):
        return load_function(reward)
    if not callable(reward):
        raise QzoError(f"the reward is {_shown(reward)}; give a function, or MODULE:FUNCTION")
    name = getattr(reward, "__name__", type(reward).__name__)
    try:
        source = inspect.getsourcefile(inspect.unwrap(reward))
    except TypeError:
        source = None
    return RewardFunction(reward, name, source if source and os.path.isfile(source) else None)


def _from_file(file: Path, name: str) -> ModuleType:
    if not file.exists():
        raise QzoError(f'reward="{name}": there is no file {file}; give the path of a .py file')
    check_regular(file, MOST_MIB)
    spec = importlib.util.spec_from_file_location(f"qzo_reward_{file.stem}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses and pickle look
    loader = spec.loader
    with _importing(str(file), file.resolve().parent):
        loader.exec_module(module)
    return module


def _imported(module: str, name: str) -> ModuleType:
    here = Path.cwd()
    with _importing(module, here):
        importlib.invalidate_caches()
        try:
            return importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module}.".startswith(f"{error.name}."):
                raise
            raise QzoError(
                f'reward="{name}": there is no module {module} in {here} or among those installed; give a module, or '
                "the path of a .py file"
            ) from error


@contextmanager
def _importing(module: str, folder: Path) -> Iterator[None]:
    """Within, modules of a folder can be imported, and what an import raises is a QzoError."""
    sys.path.insert(0, str(folder))
    try:
        yield
    except QzoError:
        raise
    except BaseException as error:  # a user's module may do anything
        if not (is_failure(error) or isinstance(error, SystemExit)):
            raise
        raise QzoError(
            f"{module} cannot be imported: {_told(error, None)}; correct it, or install what it needs"
        ) from error
    finally:
        if str(folder) in sys.path:
            sys.path.remove(str(folder))


def _told(error: BaseException, source: str | None) -> str:
    """An exception in one line, with the line of the user's file that it came from."""
    kind, text, line = type(error).__name__, one_line(error), None
    trace = error.__traceback__
    while trace is not None:
        line = trace.tb_lineno if trace.tb_frame.f_code.co_filename == source else line
        trace = trace.tb_next
    place = "" if line is None else f" in line {line} of {source}"
    return f"{kind}{place}" + (f": {text}" if text and text != kind else "")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _nothing(*_: Any, **__: Any) -> None:
    """In the place of what a trainer's log would do."""

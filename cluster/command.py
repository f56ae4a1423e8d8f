"""The contract of every pipeline's command line: arguments, logs, exit status, result."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.logs import JsonStream, json_lines, set_up_logging
from cluster.runtime.signals import (
    NAMES,
    STATUS,
    asked_by,
    command_running,
    end_command,
    interrupt_message,
    shielded,
    wait_for_handler_logs,
)
from cluster.tracking import finish_open_runs
from gare.config import Config, describe_keys, load_config
from gare.config.cpus import usable_cpus
from gare.config.loading import SizesOf
from gare.errors import ConfigError, GareError, StoppedError

logger = logging.getLogger(__name__)

#: File descriptor of stderr.
_STDERR = 2
EPILOG = """exit status:
  0 done   2 bad configuration or arguments   3 bad data   4 the run failed, or was ended by SIGTERM or Ctrl-C

keys (give any of them as section.key=value; the top-level key extends: FILE of a YAML file has it merged over
another; model.clip=auto takes all of model.clip from the weights, and extract.image_size too, whatever a file
says, unless it is given here; a part that is turned off here, such as model.increment=false, leaves out a
file's keys that only shape it):
"""


@dataclass(frozen=True)
class Flag:
    """An option of one command, beside ``--config``, that stands for a key of the configuration.

    Attributes:
        key: the key that it sets.
        meaning: text for ``--help``.
        value: value that it sets; empty: the value is given after it.
        names: names of several values that it takes; empty: one.
    """

    key: str
    meaning: str
    value: str = ""
    names: tuple[str, ...] = ()


Flags = Mapping[str, Flag]


def main(
    run: Callable[[Config], Mapping[str, Any]],
    description: str | None,
    flags: Flags | None = None,
    sizes_of: SizesOf | None = None,
) -> None:
    """Runs a pipeline as a command and exits the process with its status.

    Prints one line on stdout, the result as JSON, after the run has closed everything; logs and progress go
    to stderr.

    Args:
        run: the pipeline.
        description: text for ``--help``.
        flags: options of this command.
        sizes_of: returns the sizes that replace ``model.clip: auto``.
    """
    sys.exit(execute(run, description or "", sys.argv[1:], flags or {}, sizes_of))


def execute(
    run: Callable[[Config], Mapping[str, Any]],
    description: str,
    arguments: Sequence[str],
    flags: Flags,
    sizes_of: SizesOf | None = None,
) -> int:
    """Does what ``main`` does, but returns the status in place of exiting."""
    with command_running():
        try:
            return _execute(run, description, arguments, flags, sizes_of)
        except KeyboardInterrupt:
            return _say_interrupted()
        finally:
            _drop_unwritable_stderr()


def _drop_unwritable_stderr() -> None:
    """Sends what stderr still holds nowhere if it cannot be written: Python would end with status 120."""
    try:
        sys.stderr.flush()
    except (AttributeError, ValueError):  # there is none, or it is closed
        return
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        if nowhere != _STDERR:
            os.dup2(nowhere, _STDERR)
            os.close(nowhere)


def _execute(
    run: Callable[[Config], Mapping[str, Any]],
    description: str,
    arguments: Sequence[str],
    flags: Flags,
    sizes_of: SizesOf | None,
) -> int:
    set_up_logging()
    options = _parser(description, flags).parse_intermixed_args(arguments)
    with contextlib.ExitStack() as stack:
        try:
            overrides = [*options.overrides, *_overrides_of(options, flags)]
            config = load_config(options.config, overrides, sizes_of=sizes_of)
            if config.tracking.log_format == "json":
                stack.enter_context(json_lines(_run_of(config)))
            _limit_threads()
            # Ray prints here what its workers print; stdout is for the result alone.
            with contextlib.redirect_stdout(sys.stderr):
                result = run(config)
            line = _one_line(result)
        except KeyboardInterrupt:
            return _say_interrupted()
        except Exception as error:
            finish_open_runs(error)
            # A run that was stopped says itself what was kept.
            if asked_by() and not isinstance(error, StoppedError):
                # An error of something that was interrupted halfway: the signal is the reason.
                logger.info("error during shutdown: %s: %s", type(error).__name__, error)
                return _say_interrupted()
            if isinstance(error, GareError):
                return _say_fault(error)
            # An error that nobody foresaw: its trace is needed for a bug report.
            _say(f"{type(error).__name__}: {error}", traced=True)
            return 4
        end_command()
        sys.stdout.write(line + "\n")
        sys.stdout.flush()
        return 0


def _limit_threads() -> None:
    """Gives the threads of this process the CPUs that it may use; torch and Arrow count the machine's."""
    cpus = usable_cpus()
    if (torch := sys.modules.get("torch")) and torch.get_num_threads() > cpus:
        torch.set_num_threads(cpus)
    if (arrow := sys.modules.get("pyarrow")) and arrow.cpu_count() > cpus:
        arrow.set_cpu_count(cpus)


def _one_line(result: Mapping[str, Any]) -> str:
    """Returns the result as JSON, with escapes if stdout's encoding lacks a character (PYTHONIOENCODING)."""
    line = json.dumps(result, ensure_ascii=False, allow_nan=False)
    try:
        line.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except (UnicodeEncodeError, LookupError):
        return json.dumps(result, allow_nan=False)
    return line


def _say_interrupted() -> int:
    """Ends the open MLflow runs, says why the command ends, and returns the status."""
    with shielded():
        finish_open_runs(KeyboardInterrupt())
        _say(interrupt_message(asked_by() or NAMES[signal.SIGINT]))
    return STATUS


def _say_fault(error: GareError) -> int:
    if error.result is not None:
        sys.stdout.write(_one_line(error.result) + "\n")
    _say(str(error), traced=bool(os.environ.get("GARE_DEBUG")))
    return error.exit_code


def _say(message: str, *, traced: bool = False) -> None:
    """Prints why the command ends."""
    wait_for_handler_logs()
    # Even if stderr or its pipe has been closed, the status is returned.
    with contextlib.suppress(OSError, ValueError, AttributeError):
        if isinstance(sys.stderr, JsonStream):
            sys.stderr.error(message, traceback.format_exc() if traced else "")
            return
        if traced:
            traceback.print_exc()
        sys.stderr.write(f"error: {message}\n")


def _run_of(config: Config) -> str:
    """Returns the name of the MLflow run, or of the data set and step."""
    step = Path(sys.argv[0]).stem
    return f"{config.name}/{config.train.run if step in ('train', 'evaluate') else step}"


def _overrides_of(options: argparse.Namespace, flags: Flags) -> list[str]:
    """Translates the given flags into overrides.

    Raises:
        ConfigError: for two flags that set one key to different values.
    """
    given: dict[str, tuple[str, str]] = {}
    for name, flag in flags.items():
        value = getattr(options, name.lstrip("-").replace("-", "_"))
        if value is None:
            continue
        if isinstance(value, list):
            value = json.dumps(value)
        other, other_value = given.setdefault(flag.key, (name, value))
        if value != other_value:
            raise ConfigError(
                f"{other} and {name} exclude each other", where="arguments", accepted="one of them"
            )
    return [f"{key}={value}" for key, (_, value) in given.items()]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        fault = ConfigError(message, where="arguments", accepted="see --help")
        self.exit(fault.exit_code, f"error: {fault}\n")


def _parser(description: str, flags: Flags) -> argparse.ArgumentParser:
    lines = []
    for key, default, meaning in describe_keys():
        lines.append(f"  {key} = {default}\n      {meaning}")
    parser = _Parser(
        description=description,
        epilog=EPILOG + "\n".join(lines),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config",
        required=True,
        metavar="FILE",
        help="YAML file, such as conf/demo.yaml, or the name of one in conf/, such as demo",
    )
    for name, flag in flags.items():
        text = f"{flag.meaning}; sets {flag.key}"
        if flag.names:
            parser.add_argument(name, nargs=len(flag.names), metavar=flag.names, help=text)
        elif flag.value:
            parser.add_argument(name, action="store_const", const=flag.value, help=f"{text}={flag.value}")
        else:
            parser.add_argument(name, metavar="VALUE", help=text)
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="settings that replace the file's"
    )
    return parser

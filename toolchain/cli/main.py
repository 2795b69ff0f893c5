"""The command line: parses, calls the layer below, prints.  Each command is a module of this package,
imported only when it is used, so that ``toolchain --help`` is quick.
"""

from __future__ import annotations

import atexit
import importlib
import os
import signal
import sys
from typing import NoReturn

import click

from toolchain.cli.commands import COMMANDS
from toolchain.errors import ExitCode, ToolchainError, did_you_mean
from toolchain.version import __version__


class LazyGroup(click.Group):
    """Knows its commands by name and one-line help; imports one only to run it or to show its own help."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module = importlib.import_module(f"toolchain.cli.{name}")
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            ctx.fail(f"no such command {args[0]!r}{did_you_mean(args[0], COMMANDS)}")
        return super().resolve_command(ctx, args)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="toolchain")
@click.option("--debug", is_flag=True, help="Show tracebacks and the output of child processes.")
@click.pass_context
def cli(ctx: click.Context, debug: bool) -> None:
    """Turn a PyTorch model and one recipe into verified, measured, reproducible bundles.

    Exit codes are listed in docs/exit-codes.md.
    """
    ctx.obj = {"debug": debug}


def main(arguments: list[str] | None = None) -> NoReturn:
    """Entry point: runs the command line and ends the process with a documented exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in arguments or os.environ.get("TOOLCHAIN_DEBUG", "") not in ("", "0")
    # --debug is allowed anywhere on the line, as users put it at the end of the call that failed.
    arguments = [a for a in arguments if a != "--debug"]
    # A terminated build cleans up like an interrupted one.
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        cli.main(["--debug", *arguments] if debug else arguments, prog_name="toolchain", standalone_mode=False)
        code: int = ExitCode.OK
    except ToolchainError as error:
        code = report_error(error, debug)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        code = ExitCode.USAGE
    except click.ClickException as error:
        error.show()
        code = ExitCode.USAGE
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted: nothing half-written was left behind", err=True)
        code = ExitCode.INTERRUPTED
    except click.exceptions.Exit as error:
        code = error.exit_code
    except BrokenPipeError:
        # The reader of our output has gone (`toolchain targets | head`); that is not our failure.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = ExitCode.OK
    except Exception as error:
        code = _report_bug(error, debug)
    sys.stdout.flush()
    if code == ExitCode.INTERRUPTED:
        _end_interrupted()
    sys.exit(code)


def _end_interrupted() -> NoReturn:
    """Ends with the documented code even if the signal came while Python executed a string, as dataclasses do.

    CPython notes such an interrupt as unhandled when it passes through ``exec``, whoever handles it afterwards, and
    then ends the process by the signal (``run_eval_code_obj`` in pythonrun.c, up to 3.12).
    """
    atexit._run_exitfuncs()
    sys.stderr.flush()
    os._exit(ExitCode.INTERRUPTED)


def report_error(error: ToolchainError, debug: bool) -> int:
    """Print an error for a person on standard error; returns its exit code."""
    if debug and error.debug:
        click.echo(error.debug.rstrip(), err=True)
    click.echo(f"error: {error.render()}", err=True)
    return int(error.code)


def _report_bug(error: Exception, debug: bool) -> int:
    import traceback

    if debug:
        traceback.print_exception(error)
    kind = type(error).__name__
    hint = "this is a bug; run again with --debug and report it"
    click.echo(f"internal error: {kind}: {error}\n  hint: {hint}", err=True)
    return ExitCode.INTERNAL


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()

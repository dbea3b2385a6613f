"""The ``rotq`` command group, and the one place where errors become lines and exit codes."""

from __future__ import annotations

import sys
from typing import NoReturn

import click

from rotq import __version__
from rotq.cli.bench import bench_group
from rotq.cli.calibrate_kv import calibrate_kv
from rotq.cli.eval import eval_group
from rotq.cli.eval_kv import eval_kv
from rotq.cli.eval_pll import eval_pll
from rotq.cli.inspect import inspect
from rotq.cli.options import debug_wanted
from rotq.cli.quantize import quantize
from rotq.cli.serve_kv import serve_kv
from rotq.errors import RotqError


class Commands(click.Group):
    """A group that answers an error with one line on stderr and its exit code."""

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except click.ClickException as error:
            if debug_wanted(ctx) and error.__cause__ is not None:
                raise error.__cause__ from None
            _fail(_usage_line(error), error.exit_code)
        except RotqError as error:
            if debug_wanted(ctx):
                raise
            _fail(str(error), error.exit_code)
        except (click.exceptions.Exit, click.Abort):
            raise
        except Exception as error:
            if debug_wanted(ctx):
                raise
            _fail(f"unexpected {type(error).__name__}: {error}; --debug shows where", 1)


def _usage_line(error: click.ClickException) -> str:
    message = " ".join(error.format_message().split()).rstrip(".")
    context = error.ctx if isinstance(error, click.UsageError) else None
    return f"{message}; see '{context.command_path} --help'" if context else message


def _fail(message: str, exit_code: int) -> NoReturn:
    click.echo(f"rotq: error: {' '.join(message.split())}", err=True)
    sys.exit(exit_code)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="rotq")
def main() -> None:
    """Rotate, quantize, evaluate and serve language models.

    Results go to stdout, progress and errors to stderr. Exit codes: 0 done, 1 a model, file or
    text is not as it must be, 2 wrong usage, 3 a self-check failed, 75 stopped and resumable.
    """


main.add_command(quantize)
eval_group.add_command(eval_kv)
eval_group.add_command(eval_pll)
main.add_command(eval_group)
main.add_command(inspect)
main.add_command(calibrate_kv)
main.add_command(serve_kv)
main.add_command(bench_group)

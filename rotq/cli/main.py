"""The ``rotq`` command group."""

from __future__ import annotations

import click

from rotq import __version__
from rotq.cli.bench import bench_group
from rotq.cli.calibrate_kv import calibrate_kv
from rotq.cli.compare import compare
from rotq.cli.convert import convert
from rotq.cli.embed import embed_command
from rotq.cli.eval import eval_group
from rotq.cli.eval_contacts import eval_contacts
from rotq.cli.eval_decode import eval_decode
from rotq.cli.eval_dms import eval_dms
from rotq.cli.eval_kv import eval_kv
from rotq.cli.eval_pll import eval_pll
from rotq.cli.eval_tasks import eval_tasks
from rotq.cli.export import export
from rotq.cli.groups import Commands
from rotq.cli.inspect import inspect
from rotq.cli.push import push
from rotq.cli.quantize import quantize
from rotq.cli.report import report_command
from rotq.cli.serve_kv import serve_kv


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="rotq")
def main() -> None:
    """Rotate, quantize, evaluate and serve language models.

    Results go to stdout, progress and errors to stderr. Exit codes: 0 done, 1 a model, file or
    text is not as it must be, 2 wrong usage, 3 a self-check failed, 75 stopped and resumable.
    """


main.add_command(quantize)
eval_group.add_command(eval_contacts)
eval_group.add_command(eval_decode)
eval_group.add_command(eval_dms)
eval_group.add_command(eval_kv)
eval_group.add_command(eval_pll)
eval_group.add_command(eval_tasks)
main.add_command(eval_group)
main.add_command(compare)
main.add_command(convert)
main.add_command(embed_command)
main.add_command(export)
main.add_command(inspect)
main.add_command(push)
main.add_command(report_command)
main.add_command(calibrate_kv)
main.add_command(serve_kv)
main.add_command(bench_group)

"""Groups of commands."""

from __future__ import annotations

import click

from rotq.cli.failures import failing
from rotq.cli.hints import hint_for_command


class Group(click.Group):
    """A group that says what may have been meant by a command that it does not have."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if self.get_command(ctx, name) is None and not name.startswith("-"):
            hint = hint_for_command(name, ctx)
            ctx.fail(f"No such command {name!r}{hint and '; '}{hint}")
        return super().resolve_command(ctx, args)


class Commands(Group):
    """The group of all commands; an error in any is answered with a line and an exit code."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args:
            return super().parse_args(ctx, args)  # the help, whole
        with failing(ctx):
            args = super().parse_args(ctx, args)
        return args

    def invoke(self, ctx: click.Context) -> object:
        found: object = None
        with failing(ctx):
            found = super().invoke(ctx)
        return found

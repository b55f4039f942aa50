"""The command line, run in this process."""

from __future__ import annotations

from typer.testing import CliRunner

from sinklens.cli import app

runner = CliRunner()


def run(*arguments: str, **options) -> tuple[int, str]:
    done = runner.invoke(app, list(arguments), env={"COLUMNS": "200"}, **options)
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.output

"""Runs commands as a terminal does."""

import re

from typer.testing import CliRunner

from peft_child.cli import main as cli


def run(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def output_of(*arguments, messages=""):
    """Standard output of a command that works, and says on standard error no more than `messages`."""
    result = run(*arguments)
    assert (result.exit_code, result.stderr) == (0, messages), result.output
    return result.stdout


def error_of(*arguments):
    """The one line that a command says when it fails."""
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    lines = [line for line in result.stderr.splitlines() if not line.startswith("note: ")]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


def unstyled(text):
    """Without the colours that typer prints where an environment variable tells it to, as CI services do."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def content(path):
    """The bytes of every file in a folder, or of the file."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return {file.relative_to(path): file.read_bytes() for file in files if file.is_file()}


VERBS = ["inspect", "overlap", "extract", "merge", "combine", "patch", "verify"]


def arguments_of(verb, adapter, output, base):
    return {
        "inspect": [adapter],
        "overlap": [adapter, adapter],
        "extract": [base, adapter, output],
        "merge": [adapter, base, output],
        "combine": [output, adapter],
        "patch": [adapter, base, output],
        "verify": [adapter],
    }[verb]


def writing(verb, files, output):
    tuned = files / ("tuned.safetensors" if verb == "extract" else "chosen")
    return [verb, *arguments_of(verb, tuned, output, files / "base")]

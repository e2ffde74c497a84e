"""How the command is called: help, version, wrong arguments and Ctrl-C, as a shell sees them."""

from __future__ import annotations

import subprocess
import sys

import pytest

import sfumato

# A library that loses the interrupt which reaches it while it is imported.
CARELESS = """
import os, signal, sys, time

class Careless:
    def find_spec(self, name, path=None, target=None):
        if name == "sfumato.{module}":
            try:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(5)
            except BaseException:
                raise ImportError("no such thing") from None

sys.meta_path.insert(0, Careless())
"""


def shell(*arguments, before=""):
    code = f"{before}\nfrom sfumato.cli import main; main()"
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("arguments", "words", "help_of"),
    [
        (["trian"], "Did you mean 'train'?", "sfumato"),
        (["--bogus"], "--bogus", "sfumato"),
        (["ledger", "foo"], "foo", "sfumato ledger"),
        (["plan", "--epsilno", "3"], "--epsilno", "sfumato plan"),
        (["plan", "--epsilon", "much"], "--epsilon", "sfumato plan"),
        (["plan", "--epsilon", "1"], "--delta", "sfumato plan"),
        (["demo", "--seeds", "0"], "--seeds", "sfumato demo"),
        (["train"], "config", "sfumato train"),
        (["train", "a.toml", "b.toml"], "b.toml", "sfumato train"),
        (["ledger", "grant", "l.db", "heart", "--epsilon"], "--epsilon", "sfumato"),
    ],
)
def test_a_wrong_call_is_told_in_one_line_with_where_to_look(command, refused, arguments, words, help_of):
    line = refused(command(*arguments))
    assert words.lower() in line.lower()
    assert line.endswith(f" (see {help_of} --help)\n")


def test_the_shell_sees_the_same_line():
    done = shell("plan", "--epsilno", "3")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("sfumato: ")
    assert done.stderr.endswith(" (see sfumato plan --help)\n")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("arguments", [[], ["ledger"]])
def test_no_command_shows_the_help(command, arguments):
    shown = command(*arguments)
    assert shown.exit_code == 2
    assert "Usage: " in shown.output
    assert "sfumato: " not in shown.output


def test_help_and_version_are_no_errors(command):
    assert command("--version").stdout == f"sfumato {sfumato.__version__}\n"
    for arguments in (["--version"], ["--help"], ["plan", "--help"]):
        done = shell(*arguments)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout


@pytest.mark.parametrize(
    ("module", "arguments"), [("runs", ["train", "none.toml"]), ("report.html", ["report", "none"])]
)
def test_ctrl_c_during_an_import_is_never_lost(module, arguments):
    done = shell(*arguments, before=CARELESS.format(module=module))
    assert done.returncode == 130, done.stderr
    assert done.stderr == "sfumato: stopped by Ctrl-C; no result was written.\n"
    assert done.stdout == ""

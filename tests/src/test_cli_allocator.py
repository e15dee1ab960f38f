"""`hf-tfamily train` starts itself once more under an allocator for long rows, and is otherwise as if it had not."""

import os
import platform
import signal
import subprocess
import sys

import pytest

from hf_tfamily_cli import ALLOCATOR

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the variables are glibc's")
# The command without its imports: what stands in the place of typer's app is the test's.
STUB = """
import os, sys, time, hf_tfamily_cli
def app():
    names = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")
    print(os.getpid(), *(os.environ.get(name) for name in names), *sys.argv[1:], flush=True)
    {body}
hf_tfamily_cli.app = app
hf_tfamily_cli.main()
"""
CLEAN = {name: value for name, value in os.environ.items() if name not in (*ALLOCATOR, "GLIBC_TUNABLES")}
NOTED = (
    "import os, sys; open({file!r}, 'a').write(f'{{os.getpid()}} {{os.environ.get(\"MALLOC_TRIM_THRESHOLD_\")}}\\n')"
)


def start(*arguments, body="pass", environment=()):
    command = [sys.executable, "-c", STUB.format(body=body), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**CLEAN, **dict(environment)})


def printed(*arguments, **options):
    process = start(*arguments, **options)
    pid, *words = process.communicate(timeout=60)[0].split()
    return int(pid) == process.pid, words


def test_training_has_the_variables_in_the_same_process():
    assert printed("train", "a recipe") == (True, ["131072", "131072", "train", "a", "recipe"])
    assert printed("--traceback", "train", "x") == (True, ["131072", "131072", "--traceback", "train", "x"])


def test_other_commands_do_not():
    assert printed("show", "train") == (True, ["None", "None", "show", "train"])
    assert printed() == (True, ["None", "None"])


def test_what_the_user_has_set_stays():
    own = {"MALLOC_TRIM_THRESHOLD_": "5"}
    assert printed("train", environment=own) == (True, ["None", "5", "train"])
    assert printed("train", environment={"GLIBC_TUNABLES": "glibc.malloc.check=0"})[1] == ["None", "None", "train"]


def test_exit_codes_and_signals_pass():
    process = start("train", body="sys.exit(7)")
    process.communicate(timeout=60)
    assert process.returncode == 7
    process = start("train", body="time.sleep(60)")
    process.stdout.readline()  # it is there
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == -signal.SIGTERM


@pytest.mark.parametrize("command", [["hf-tfamily"], [sys.executable, "-m", "hf_tfamily"]], ids=["command", "module"])
def test_the_command_starts_once_more(command, tmp_path):
    """Each start of an interpreter leaves a line: one without the variables, one with them, of one process."""
    starts = tmp_path / "starts"
    (tmp_path / "sitecustomize.py").write_text(NOTED.format(file=str(starts)))
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    bin_folder = os.path.dirname(sys.executable)
    command = [os.path.join(bin_folder, command[0]), *command[1:]]
    process = subprocess.Popen(
        [*command, "train", "--help"], env={**CLEAN, "PYTHONPATH": path}, stdout=subprocess.PIPE, text=True
    )
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0
    assert "Train a recipe" in output
    assert starts.read_text().split("\n") == [f"{process.pid} None", f"{process.pid} 131072", ""]


def test_a_call_from_other_programs_leaves_them_alone(monkeypatch):
    """sys.argv alone, as tests and notebooks set it, is no command line of this process."""
    import hf_tfamily_cli

    for name in (*ALLOCATOR, "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "argv", ["hf-tfamily", "train", "a recipe that nobody has"])
    monkeypatch.setattr(os, "execve", lambda *_: pytest.fail("started anew"))
    hf_tfamily_cli.train_under_allocator()

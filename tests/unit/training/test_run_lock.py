"""A second run in a directory is refused while the first lives, and a dead one does not bar the way."""

import json
import os
import socket
import subprocess
import sys

import psutil
import pytest

from mqat.training.run_lock import FILE, lock_run_directory


def write_lock(directory, **changes):
    own = psutil.Process()
    holder = {"host": socket.gethostname(), "pid": own.pid, "started": own.create_time()} | changes
    (directory / FILE).write_text(json.dumps(holder))


@pytest.fixture
def other():
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process
    process.kill()
    process.wait()


def test_a_living_process_keeps_others_out_and_a_dead_one_does_not(tmp_path, other):
    started = psutil.Process(other.pid).create_time()
    write_lock(tmp_path, pid=other.pid, started=started)
    before = (tmp_path / FILE).read_text()
    with pytest.raises(ValueError, match=rf"process {other.pid} on .* runs in this directory"):
        lock_run_directory(tmp_path)
    assert (tmp_path / FILE).read_text() == before
    write_lock(tmp_path, pid=other.pid, started=started - 60)  # another process had this number
    lock_run_directory(tmp_path)
    assert json.loads((tmp_path / FILE).read_text())["pid"] == os.getpid()
    write_lock(tmp_path, pid=other.pid, started=started)
    other.kill()
    other.wait()
    lock_run_directory(tmp_path)
    lock_run_directory(tmp_path)  # this process has it already


def test_another_machine_has_the_directory_as_long_as_it_gives_signs_of_life(tmp_path):
    write_lock(tmp_path, host="elsewhere")
    with pytest.raises(ValueError, match="on elsewhere runs in this directory"):
        lock_run_directory(tmp_path)
    os.utime(tmp_path / FILE, (0, 0))
    lock_run_directory(tmp_path)


def test_the_lock_goes_with_its_process(tmp_path):
    code = "import pathlib, sys; from mqat.training.run_lock import lock_run_directory as lock; "
    code += (
        "lock(pathlib.Path(sys.argv[1])); assert (pathlib.Path(sys.argv[1]) / 'run.lock').is_file()"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    assert not (tmp_path / FILE).exists()

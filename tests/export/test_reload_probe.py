"""The process that checks an export ends with the one that started it."""

from __future__ import annotations

import inspect
import subprocess
import sys

from lowrank_pl.export.reload_probe import end_with_parent

CHILD = f"""
import os, sys, threading, time
{inspect.getsource(end_with_parent)}
end_with_parent(int(sys.argv[1]))
print("here", flush=True)
time.sleep(60)
"""
PARENT = """
import os, subprocess, sys, time
subprocess.Popen([sys.executable, "-c", sys.argv[1], str(os.getpid())])
time.sleep(60)
"""


def test_a_child_ends_when_its_parent_is_killed():
    parent = subprocess.Popen([sys.executable, "-c", PARENT, CHILD], stdout=subprocess.PIPE, text=True)
    assert parent.stdout.readline() == "here\n"
    parent.kill()
    # The pipe ends when the child does, which holds it too.
    assert parent.communicate(timeout=20) == ("", None)

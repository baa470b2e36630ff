"""Long use leaks no hook, open file, thread or memory."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.small_models import nudge, tiny

# Runs in a separate process, so that no other test uses its memory and files.
PROGRAM = """
import gc, json, os, sys, threading
import torch
import affectlens as al

torch.set_num_threads(1)
base, tuned = sys.argv[1:]
lens = al.load(base)
ids = torch.arange(1, 9).reshape(1, -1)
change = al.Transplant(lens.sites, donor=tuned)


def enter():
    with lens.intervene(change):
        lens.model(input_ids=ids)


def look():
    gc.collect()
    pages = int(open("/proc/self/statm").read().split()[1])
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + ("forward" in vars(m)) for m in lens.model.modules())
    return {"memory": pages, "files": len(os.listdir("/proc/self/fd")), "threads": threading.active_count(), "hooks": hooks}


for work, times in ((enter, 1000), (lambda: al.diff(base, tuned, progress=False), 300)):
    for _ in range(times // 10):
        work()
    before = look()
    for _ in range(times):
        work()
    print(json.dumps([before, look()]))
"""  # noqa: E501


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_a_thousand_interventions_and_300_diffs_leave_nothing(
    save: Callable[..., Path], record_property: Callable[[str, object], None]
) -> None:
    """After a tenth of the work as warm-up, hooks, files and threads stay the same, memory within 5 %."""
    base, tuned = save(tiny("llama"), "base"), save(nudge(tiny("llama"), "mlp"), "tuned", shards=True)
    command = [sys.executable, "-c", PROGRAM, str(base), str(tuned)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert 0 == run.returncode, run.stderr

    for line, what in zip(run.stdout.splitlines(), ("1,000 interventions", "300 diffs"), strict=True):
        before, after = json.loads(line)
        grown = after.pop("memory") / before.pop("memory")
        assert before == after
        assert grown <= 1.05, f"{grown - 1:.1%} more memory"
        record_property(f"memory after {what}", f"{grown - 1:+.1%}")

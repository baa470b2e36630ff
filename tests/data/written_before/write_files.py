"""Write the tables and the journal of this folder; run with affectlens at commit e6ee4aa.

    PYTHONPATH=OLD_CHECKOUT python tests/data/written_before/write_files.py

Never write them again: `tests/test_written_before.py` tests that later versions still read them.
"""

import json
import sqlite3
import sys
from dataclasses import replace
from pathlib import Path

import affectlens as al
from affectlens.table import versions

HERE = Path(__file__).parent


def main(folder: Path) -> None:
    """Diff, follow, compare, judge and sweep the demo pair."""
    demo = al.load_demo()
    drift = al.diff(demo.base, demo.tuned, control=demo.control, detail="heads", progress=False)
    language = drift.where(tower="language", layer=(0, 1), role=("gate_proj", "q_proj", "norm"))
    for suffix in (".parquet", ".csv", ".json"):
        language.save(folder / f"drift{suffix}")
    way = al.trajectory([demo.base, demo.control, demo.tuned], progress=False)
    way.where(layer=0, role="gate_proj").save(folder / "trajectory.parquet")
    other = al.diff(demo.base, demo.control, progress=False)
    al.agreement([drift, other]).save(folder / "agreement.json")

    lens = al.load(demo.base, dtype="float32", device="cpu")
    task = demo.task("sentences")
    task = replace(task, examples=task.examples[::5])
    al.evaluate(lens, task).save(folder / "scores.csv")
    gates = demo.base.sites.where(tower="language", role="gate_proj", layer=(0, 1))
    grid = al.Grid(gates, by="layer", actions=("transplant", "revert", "zero"), donor=demo.tuned, n_random=0)
    effects = al.sweep(lens, grid, task, journal=folder / "sweep.journal", progress=False)
    effects.save(folder / "effects.parquet")
    settings = {"versions": versions(), "config": lens.model.config.to_json_string()}
    (folder / "settings.json").write_text(json.dumps(settings, indent=1) + "\n", "utf-8")
    with sqlite3.connect(folder / "sweep.journal") as rows:
        rows.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        print(rows.execute("SELECT count(*) FROM judged").fetchone()[0], "results in the journal")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)

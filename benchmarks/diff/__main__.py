"""Print the table: `python -m benchmarks.diff [--size small|0.5b|3b|7b] [--folder DIR] [--repeats N]`."""

import os

# One thread each, also where a library reads the variable when it is imported.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

from benchmarks.diff.figures import main

if __name__ == "__main__":
    main()

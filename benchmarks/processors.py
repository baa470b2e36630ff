"""Run the numeric tests with other processors' instructions: python -m benchmarks.processors [tests ...].

Each setting makes numba, torch or MKL use other instructions, and so add in another order. Settings that
this machine can't run are listed as skipped. A full run takes hours on two cores; name folders or files of
tests to run fewer.
"""

import os
import re
import subprocess
import sys
import tempfile

from llvmlite import binding

TESTS = (
    "tests/drift",
    "tests/lens",
    "tests/interventions",
    "tests/writing",
    "tests/probes",
    "tests/effects",
    "tests/stats",
)
COMPILED = ("tests/drift",)  # all that numba compiles is the engine of a diff
# Without features of its own a named processor is compiled for with those of this machine.
HASWELL = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avx2,+fma,+f16c,+bmi2"}
SETTINGS: dict[str, tuple[dict[str, str], str]] = {  # and the feature that the machine needs
    "this machine": ({}, ""),
    "numba: haswell": (HASWELL, "avx2"),
    "numba: skylake-avx512": ({"NUMBA_CPU_NAME": "skylake-avx512"}, "avx512f"),
    "numba: no vectors": ({**HASWELL, "NUMBA_LOOP_VECTORIZE": "0", "NUMBA_SLP_VECTORIZE": "0"}, "avx2"),
    "numba: oldest x86-64": ({"NUMBA_CPU_NAME": "generic"}, "sse2"),
    "torch: no vectors": ({"ATEN_CPU_CAPABILITY": "default"}, ""),
    "torch: AVX2": ({"ATEN_CPU_CAPABILITY": "avx2"}, "avx2"),
    "torch: AVX-512": ({"ATEN_CPU_CAPABILITY": "avx512"}, "avx512f"),
    "MKL: SSE4.2": ({"MKL_ENABLE_INSTRUCTIONS": "SSE4_2"}, "sse4.2"),
    "MKL: AVX2": ({"MKL_ENABLE_INSTRUCTIONS": "AVX2"}, "avx2"),
    "MKL: any processor": ({"MKL_CBWR": "COMPATIBLE"}, "sse2"),
    "two threads": ({"OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2"}, ""),
}


def run(setting: dict[str, str], tests: list[str]) -> tuple[str, str, list[str]]:
    """Return how many tests passed, how many failed, and the names of these."""
    with tempfile.TemporaryDirectory() as cache:  # what was compiled for this machine is not taken
        environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        environment |= {**os.environ, "NUMBA_CACHE_DIR": cache, **setting}
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *tests]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    passed = re.findall(r"^(?:.*, )?(\d+) passed", done.stdout, re.MULTILINE)
    if done.returncode not in (0, 1):
        return "?", f"exit status {done.returncode}", failed
    return passed[-1] if passed else "0", str(len(failed)), failed


def main() -> None:
    """Print a row a setting: its name, how many tests passed and failed."""
    features = binding.get_host_cpu_features()
    print("| setting | passed | failed |\n|---|---|---|", flush=True)
    for name, (setting, needed) in SETTINGS.items():
        if needed and not features.get(needed):
            print(f"| {name} | skipped: no {needed} here | |", flush=True)
            continue
        chosen = sys.argv[1:] or [*(COMPILED if name.startswith("numba") else TESTS)]
        passed, failed, names = run(setting, chosen)
        print(f"| {name} | {passed} | {' '.join([failed, *names])} |", flush=True)


if __name__ == "__main__":
    main()

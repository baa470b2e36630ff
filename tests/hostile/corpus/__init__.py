"""The corpus: one module for each family of inputs."""

from tests.hostile.case import Case
from tests.hostile.corpus import (
    adapters,
    archives,
    configs,
    headers,
    impostors,
    indexes,
    names,
    pairs,
    pickles,
    places,
    quantised,
)

CASES: tuple[Case, ...] = (
    *headers.CASES,
    *indexes.CASES,
    *places.CASES,
    *impostors.CASES,
    *names.CASES,
    *pickles.CASES,
    *archives.CASES,
    *configs.CASES,
    *pairs.CASES,
    *quantised.CASES,
    *adapters.CASES,
)

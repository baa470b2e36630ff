"""The process that runs the cases."""

from collections.abc import Iterator

import pytest

from tests.hostile.running import Server


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """One fork server for the session."""
    found = Server()
    yield found
    found.close()

"""Each kind of point has its row in the table of places."""

import pytest

import affectlens as al
from affectlens.errors import NoSuchSite
from affectlens.lens.hooks import places
from affectlens.sites import Point
from affectlens.sites.points import KINDS
from tests.lens.families import base


def test_every_kind_of_point_has_a_row() -> None:
    """The kinds that users can name, and the mask that a knockout rewrites."""
    assert {*KINDS, "attention"} == set(places._KINDS)


def test_an_unknown_kind_is_an_error() -> None:
    """A point made by hand, with a kind that has no row, is not taken for an output."""
    model = base("llama")
    lens = al.Lens(model)
    point = Point(lens.sites.where(role="gate_proj")[0], "gate")

    with pytest.raises(NoSuchSite, match=r"no point 'gate'\. Points: output.*Did you mean 'gated'"):
        places.place_of(point, model=model, live=lens.checkpoint)

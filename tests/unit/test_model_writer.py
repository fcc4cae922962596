"""A model written to a file and read back is the same model."""

import tomllib
from dataclasses import replace

import pytest

from planner.errors import SpecError
from planner.specs.model import Attention, Block, Mlp, Model
from planner.specs.model_file import model_from_table
from planner.specs.model_writer import model_toml
from planner.specs.models import list_models, load_model


@pytest.mark.parametrize("name", list_models())
def test_every_shipped_model_survives(name):
    model = load_model(name)
    again = model_from_table(tomllib.loads(model_toml(model, 'said "so"')), name, name)
    assert again.source == 'said "so"'
    printed = (
        "published_parameters",
        "published_active_parameters",
        "published_digits",
        "published_active_digits",
        "exception",
    )
    plain = {field: getattr(again, field) for field in (*printed, "source", "extras")}
    assert again == replace(model, **plain)


def test_layers_without_a_pattern_are_refused():
    """The format holds one attention table, so two kinds of full attention do not fit."""
    wide, narrow = (Block(Attention(heads, heads, 64), mlp=Mlp(2048)) for heads in (16, 8))
    model = Model(
        name="odd", family="odd", arch="decoder", hidden=1024, vocab=1000, max_seq_len=512,
        blocks={"wide": wide, "narrow": narrow}, layers=(("wide", 1), ("narrow", 1)),
    )  # fmt: skip
    with pytest.raises(SpecError, match="do not fit the file format"):
        model_toml(model, "nowhere")

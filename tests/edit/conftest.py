"""Decoders of several kinds, loaded once."""

import functools

import pytest
from random_codecs import RANDOM, SMALL, save_random

from magnet_jax.codec.encodec import load_decoder


@pytest.fixture(scope="session")
def load(tmp_path_factory):
    folder = tmp_path_factory.mktemp("codecs")

    @functools.cache
    def load(kind):
        if kind == "embedded":
            return load_decoder("embedded")
        if kind == "interleaved":
            return load_decoder("embedded", num_codebooks=4, interleaved=True)
        save_random(folder / kind, SMALL | RANDOM[kind])
        return load_decoder(str(folder / kind))

    return load

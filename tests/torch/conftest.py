"""A tiny Llama for the tests of torch modules."""

import pytest

from tests.torch.checks import random_model


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    """The folder of a tiny Llama of four layers, and the torch module."""
    folder = tmp_path_factory.mktemp("llama")
    module = random_model("llama")
    module.save_pretrained(folder)
    return folder, module

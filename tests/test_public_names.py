"""The public names: each can be imported from `ggml_diffusion`, and none loads before it is used."""

import subprocess
import sys

import pytest

import ggml_diffusion


@pytest.mark.parametrize("name", ggml_diffusion.__all__)
def test_every_public_name_is_there_under_its_own_name(name: str) -> None:
    assert getattr(ggml_diffusion, name).__name__ == name


def test_another_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Q5Model'"):
        _ = ggml_diffusion.Q5Model


def test_importing_the_package_loads_no_part_of_it() -> None:
    code = "import ggml_diffusion, sys; print([m for m in sys.modules if m.startswith('ggml_diffusion.')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

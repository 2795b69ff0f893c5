"""What bundle-run says to mistakes in its arguments."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from edge_support import image, program

from toolchain.runtime.edge.build import RunnerFiles


@pytest.mark.parametrize("also", [False, True], ids=["alone", "beside-the-right-one"])
def test_a_wrong_input_name_is_told_with_the_names_that_are_allowed(
    built: RunnerFiles, release: Path, tmp_path: Path, also: bool
) -> None:
    np.save(tmp_path / "x.npy", image(2))
    right = ["--input", f"image={tmp_path / 'x.npy'}"] if also else []
    done = program(built, "run", release, *right, "--input", f"imagee={tmp_path / 'x.npy'}")
    assert done.returncode == 32
    assert done.stdout == ""
    assert "the model has no input 'imagee'; it has image" in done.stderr
    missing = program(built, "run", release)
    assert missing.returncode == 32
    assert "input 'image' is missing" in missing.stderr

"""What the server refuses before a request is queued."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.bundle_samples import MATRIX_CONTRACT

from toolchain.runtime.contract import parse_contract
from toolchain.runtime.server.api import InferRequest, ServeError, Status
from toolchain.runtime.server.checks import RequestCheck

SPEC = {"name": "ids", "dtype": "int64", "shape": ["batch", 3], "pad": None, "low": 0, "high": 99}
CHECK = RequestCheck("m", parse_contract({**MATRIX_CONTRACT, "inputs": [SPEC]}, "contract.json"), [{}])


def request(*rows: list[int]) -> InferRequest:
    return InferRequest("m", "", {"ids": np.array(rows, np.int64)})


def test_whole_numbers_outside_of_the_range_are_refused_in_every_request_of_a_shape() -> None:
    _, fit = CHECK.check(request([0, 50, 99]))
    assert fit.rows == 1
    for _ in range(2):
        with pytest.raises(ServeError) as caught:
            CHECK.check(request([0, 50, 100]))
        assert caught.value.status is Status.INVALID
        assert str(caught.value) == "model 'm': input 'ids' must hold values from 0 to 99, got values from 0 to 100"
    assert CHECK.check(request([0, 50, 99]))[1] is fit

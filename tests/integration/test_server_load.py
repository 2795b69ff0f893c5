"""Loading a model with another configuration, and which extensions a server says that it has."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
from tritonclient.utils import InferenceServerException

from tests.helpers.served import served
from tests.helpers.serving_core import inputs_of, obedient_release, serving

NAME = "obedient"
ALWAYS = {"classification", "schedule_policy", "model_configuration", "binary_tensor_data", "parameters", "statistics"}


@pytest.fixture(scope="module")
def addresses(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    release = obedient_release(tmp_path_factory.mktemp("release"))
    with served(release, "--allow-admin", "--threads=1") as found:
        yield found


@pytest.fixture
def client(addresses: tuple[str, str]) -> Iterator[Any]:
    with triton_http.InferenceServerClient(addresses[0]) as http:
        yield http
        http.load_model(NAME)


def ask(client: Any, rows: int) -> np.ndarray:
    inputs = []
    for name, array in inputs_of(1.5, rows=rows).items():
        tensor = triton_http.InferInput(name, list(array.shape), "FP32" if name == "x" else "INT64")
        tensor.set_data_from_numpy(array)
        inputs.append(tensor)
    found: np.ndarray = client.infer(NAME, inputs).as_numpy("y")
    return found


def refusal(client: Any, config: object) -> str:
    text = config if isinstance(config, str) else json.dumps(config)
    with pytest.raises(InferenceServerException) as caught:
        client.load_model(NAME, config=text)
    message = caught.value.message()
    assert message.startswith("failed to load 'obedient': ")
    return str(message)


def test_a_model_is_served_as_the_configuration_says_until_it_is_loaded_again(client: Any) -> None:
    assert client.get_model_config(NAME)["max_batch_size"] == 64
    client.load_model(NAME, config='{"max_batch_size": "16"}')
    assert client.get_model_config(NAME)["max_batch_size"] == 16
    assert ask(client, 16).shape == (16, 4)
    with pytest.raises(InferenceServerException, match="17"):
        ask(client, 17)
    client.load_model(NAME)
    assert client.get_model_config(NAME)["max_batch_size"] == 64
    assert ask(client, 17).shape == (17, 4)


def test_merging_queue_instances_and_threads_can_be_set(client: Any) -> None:
    batching = {
        "preferred_batch_size": [4, 8],
        "max_queue_delay_microseconds": "200",
        "priority_levels": 3,
        "default_priority_level": 2,
        "default_queue_policy": {"max_queue_size": 7, "default_timeout_microseconds": "2000000"},
    }
    client.load_model(
        NAME,
        config=json.dumps(
            {
                "name": NAME,
                "dynamic_batching": batching,
                "instance_group": [{"kind": "KIND_CPU", "count": 2}],
                "parameters": {"threads": {"string_value": "1"}, "execution": {"string_value": "thread"}},
            }
        ),
    )
    config = client.get_model_config(NAME)
    assert config["instance_group"][0]["count"] == 2
    assert config["parameters"]["execution"] == {"string_value": "thread"}
    told = config["dynamic_batching"]
    assert told["preferred_batch_size"] == [8]
    assert (told["max_queue_delay_microseconds"], told["priority_levels"], told["default_priority_level"]) == (
        200,
        3,
        2,
    )
    policy = told["default_queue_policy"]
    assert (policy["max_queue_size"], policy["default_timeout_microseconds"]) == (7, 2000000)
    np.testing.assert_array_equal(ask(client, 3), np.full((3, 4), 1.5, np.float32))


def test_what_a_client_was_told_may_be_sent_back(addresses: tuple[str, str], client: Any) -> None:
    config = client.get_model_config(NAME)
    client.load_model(NAME, config=json.dumps(config | {"max_batch_size": 32}))
    assert client.get_model_config(NAME) == config | {"max_batch_size": 32}
    with triton_grpc.InferenceServerClient(addresses[1]) as grpc:
        told = grpc.get_model_config(NAME, as_json=True)["config"]
        grpc.load_model(NAME, config=json.dumps(told | {"max_batch_size": 8}))
        assert grpc.get_model_config(NAME).config.max_batch_size == 8


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ("nonsense", "'config' is not JSON"),
        ("[]", "not a JSON object"),
        ({"max_batch_size": 65}, "65 is not what the bundle takes, 1 to 64"),
        ({"max_batch_size": "many"}, "a whole number of at least 1, got 'many'"),
        ({"max_batch_size": -1}, "a whole number of at least 1"),
        ({"max_batch": 3}, "'max_batch' of the configuration cannot be set (did you mean 'max_batch_size'?)"),
        ({"backend": "tensorrt"}, "'backend' is \"onnxruntime\" by the bundle"),
        ({"input": []}, "'input' is "),
        ({"ensemble_scheduling": {}}, "'ensemble_scheduling' of the configuration cannot be set"),
        ({"instance_group": [{"count": 0}]}, "instance_group.count is a whole number of at least 1"),
        ({"instance_group": [{"kind": "KIND_GPU"}]}, "'instance_group.kind' is \"KIND_CPU\""),
        ({"instance_group": 3}, "a list of groups"),
        ({"dynamic_batching": {"preferred_batch_size": [65]}}, "above max_batch_size 64"),
        ({"dynamic_batching": {"preserve_ordering": True}}, "preserve_ordering cannot be set to other than false"),
        ({"dynamic_batching": {"default_priority_level": 3}}, "a level from 1 to 1"),
        ({"parameters": {"precision": {"string_value": "fp8"}}}, "'parameters.precision' is "),
        ({"parameters": {"execution": {"string_value": "moon"}}}, "execution: "),
        ({"parameters": {"execution": {"string_value": "inline"}}, "instance_group": [{"count": 2}]}, "one instance"),
    ],
)
def test_what_cannot_be_is_refused_and_changes_nothing(client: Any, config: object, told: str) -> None:
    before = client.get_model_config(NAME)
    assert told in refusal(client, config)
    assert client.get_model_config(NAME) == before
    assert ask(client, 2).shape == (2, 4)


def test_files_are_not_loaded_over_the_network(client: Any) -> None:
    with pytest.raises(InferenceServerException, match=r"parameter 'file:1/model\.onnx' is not supported"):
        client.load_model(NAME, config="{}", files={"file:1/model.onnx": b"model"})
    assert client.is_model_ready(NAME)


def test_a_model_that_is_not_loaded_is_loaded_with_the_configuration(client: Any) -> None:
    client.unload_model(NAME)
    client.load_model(NAME, config='{"max_batch_size": 5}')
    assert client.get_model_config(NAME)["max_batch_size"] == 5


def test_the_server_names_only_extensions_that_are_on(addresses: tuple[str, str], tmp_path: Path) -> None:
    def told(http: str, grpc: str) -> set[str]:
        with triton_http.InferenceServerClient(http) as client, triton_grpc.InferenceServerClient(grpc) as other:
            found = client.get_server_metadata()["extensions"]
            assert list(other.get_server_metadata().extensions) == found
            return set(found)

    assert told(*addresses) == ALWAYS | {"model_repository", "logging"}
    settings = tmp_path / "serve.toml"
    settings.write_text("shared_memory = true\n")
    with served(obedient_release(tmp_path), "--settings", settings) as found:
        assert told(*found) == ALWAYS | {"system_shared_memory"}


def test_versions_that_were_replaced_stay_away(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(trial_requests=0) as core:
            for number in (1, 2):
                await core.repository.add(str(obedient_release(tmp_path, f"{number}.0.0", offset=number)))
            await core.load(NAME, {"config": '{"max_batch_size": 4}'})
            assert [entry.version for entry in core.index(ready_only=True)] == ["2.0.0"]
            assert core.config(NAME)["max_batch_size"] == 4

    asyncio.run(main())

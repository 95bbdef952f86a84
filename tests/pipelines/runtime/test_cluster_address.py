"""A cluster that does not answer is named at once."""

import socket
import time

import pytest

from ddpm_core.errors import InputError
from pipelines.runtime.cluster import check_address


@pytest.mark.parametrize("address", ["", "auto", "local"])
def test_an_address_that_names_no_host_is_left_to_ray(address: str) -> None:
    check_address(address)


@pytest.mark.parametrize("form", ["127.0.0.1:{port}", "ray://127.0.0.1:{port}"])
def test_an_address_where_somebody_answers_passes_and_another_is_refused(form: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = form.format(port=server.getsockname()[1])
        check_address(address)
    began = time.monotonic()
    with pytest.raises(InputError, match=f"^RAY_ADDRESS is '{address}', where no Ray answers .*unset it to run here$"):
        check_address(address)
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("address", ["127.0.0.1:no", "nowhere.invalid:6379", "127.0.0.1:99999"])
def test_an_address_that_is_none_is_refused_in_a_sentence(address: str) -> None:
    with pytest.raises(InputError, match=r"^RAY_ADDRESS is "):
        check_address(address)


def test_the_job_apis_address_is_told_from_the_clusters() -> None:
    with pytest.raises(InputError, match="the address of the job API: submit this command there"):
        check_address("http://127.0.0.1:8265")

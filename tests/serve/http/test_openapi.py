"""Whatever the OpenAPI description lets one ask: never an error of the server's own."""

from __future__ import annotations

from contextlib import nullcontext, suppress

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable

schemathesis = pytest.importorskip(
    "schemathesis", reason="schemathesis is not installed: pip install schemathesis"
)

KINDS = [schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE]


@pytest.mark.slow
def test_no_request_that_is_described_makes_the_server_fail(house, start):
    schema = schemathesis.openapi.from_url(f"http://{start(house.app())}/v1/openapi.json")
    seen: set[int] = set()

    def ask(case, who: str, known: bool) -> None:
        if known and "tenant" in (case.path_parameters or {}):
            case.path_parameters["tenant"] = "acme"
        response = case.call(headers=house.headers(who))
        seen.add(response.status_code)
        assert response.status_code < 500, response.text
        if response.status_code >= 400 and case.method != "HEAD":
            assert response.json().keys() == {"error", "type"}

    operations = [result.ok() for result in schema.get_all_operations()]
    assert len(operations) > 10
    for operation in operations:
        for kind in KINDS:
            made = given(
                operation.as_strategy(generation_mode=kind),
                st.sampled_from(["admin", "acme", "reader"]),
                st.booleans(),
            )(ask)
            # Without a body there is nothing malformed to send: any text is a path.
            bare = kind is KINDS[1] and not operation.body
            with suppress(Unsatisfiable) if bare else nullcontext():
                settings(max_examples=12, suppress_health_check=list(HealthCheck))(made)()
    assert seen >= {200, 201, 400, 403, 404}
    assert house.registry.audit.verify() > 0

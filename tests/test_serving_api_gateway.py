"""Who may ask, what every answer carries, and what can be looked at."""

import re
from typing import Any

import pytest
from api_calls import HELLO, Wire, call, chat, events, run, says, server
from prometheus_client.parser import text_string_to_metric_families
from starlette.applications import Starlette
from starlette.routing import Route
from tiny_model import TOKENIZER

from dsv3.errors import UserError
from dsv3.serving.api.settings import Settings
from dsv3.serving.messages import Stats

KEYS = ("first-key-1234", "second-key-567")


def locked(**settings: Any) -> Starlette:
    return server(says("the cat"), api_keys=KEYS, **settings)


def routes(app: Starlette) -> list[tuple[str, str]]:
    """(method, path) of all there is."""
    found = [route for route in app.routes if isinstance(route, Route)]
    assert len(found) == len(app.routes), "what is no Route is not checked below"
    return [
        (method, re.sub(r"\{.*\}", "tiny", route.path))
        for route in found
        for method in (route.methods or {"GET", "POST"})
    ]


BAD_KEYS = ["", "Bearer", "Bearer ", "Bearer wrong-key-1234", "Basic first-key-1234", "first-key-1234", "Bearer é"]


@pytest.mark.parametrize("open_metrics", [False, True])
@pytest.mark.parametrize("given", BAD_KEYS)
def test_every_route_but_health_is_shut_without_a_key(given: str, open_metrics: bool):
    app = locked(open_metrics=open_metrics)
    free = {"/health", "/ready"} | ({"/metrics"} if open_metrics else set())
    listed = routes(app)
    assert ("POST", "/beta/chat/completions") in listed
    for method, path in [*listed, ("GET", "/nothing"), ("DELETE", "/v1/models")]:
        headers = {"Authorization": given.encode()} if given else {}
        response = call(app, path, HELLO if method == "POST" else None, method, **headers)
        assert (response.status_code == 401) == (path not in free), (method, path)
        if path not in free:
            assert response.headers["www-authenticate"] == "Bearer"
            assert method == "HEAD" or response.json()["error"]["code"] == "invalid_api_key"


@pytest.mark.parametrize("key", KEYS)
def test_each_key_opens(key: str):
    app = locked()
    assert call(app, "/v1/models", Authorization=f"Bearer {key}").status_code == 200
    assert call(app, "/v1/chat/completions", HELLO, Authorization=f"bearer {key}").status_code == 200


def test_keys_are_not_kept():
    service = locked().state.service
    assert not any(key in str(vars(service.keys)) for key in KEYS)


def test_a_body_without_a_key_is_not_even_read():
    async def work() -> Wire:
        wire = Wire(locked(), "/v1/chat/completions", HELLO)
        await wire.start()
        return wire

    wire = run(work())
    assert wire.messages[0]["status"] == 401 and wire.taken == 0


@pytest.mark.parametrize("key", ["short", "with space at end ", "schlüssel-lang"])
def test_keys_that_no_header_can_carry_are_refused_at_the_start(key: str):
    with pytest.raises(UserError, match="API key"):
        Settings(("m",), api_keys=(key,))


@pytest.mark.parametrize(
    "wrong",
    [
        {"models": ()},
        {"format": "v9"},
        {"secret": b"short"},
        {"temperature": 3},
        {"top_p": 0},
        {"timeout": 0},
        {"max_queued": 0},
        {"max_per_key": 0},
    ],
)
def test_settings_out_of_range_are_refused(wrong: dict[str, Any]):
    with pytest.raises(UserError, match=r"^server: "):
        Settings(**({"models": ("m",)} | wrong))


def test_pages_of_other_origins_may_not_ask():
    app = server(says("x"))
    response = call(app, "/health", Origin="https://elsewhere.example")
    assert not [name for name in response.headers if name.startswith("access-control")]
    preflight = call(app, "/v1/chat/completions", method="OPTIONS", Origin="https://a.example")
    assert preflight.status_code == 405 and "access-control-allow-origin" not in preflight.headers


def test_pages_of_named_origins_may():
    app = server(says("x"), cors_origins=("https://a.example",), api_keys=KEYS)
    asked = {"Access_Control_Request_Method": "POST", "Access_Control_Request_Headers": "authorization"}
    path = "/v1/chat/completions"
    allowed = call(app, path, method="OPTIONS", Origin="https://a.example", **asked)
    assert allowed.headers["access-control-allow-origin"] == "https://a.example"
    refused = call(app, path, method="OPTIONS", Origin="https://b.example", **asked)
    assert "access-control-allow-origin" not in refused.headers
    shut = call(app, path, HELLO, Origin="https://a.example")
    assert shut.status_code == 401 and shut.headers["access-control-allow-origin"] == "https://a.example"


def test_a_request_is_named_by_its_client_or_by_the_server():
    app = server(says("x"))
    assert call(app, "/health", X_Request_Id="run-7.a_B").headers["x-request-id"] == "run-7.a_B"
    for odd in ("a b", "x" * 129, "<script>", ""):
        assert re.fullmatch("[0-9a-f]{32}", call(app, "/health", X_Request_Id=odd).headers["x-request-id"])
    for path in ("/nothing", "/v1/chat/completions"):
        assert call(app, path).headers["x-request-id"]
    assert call(locked(), "/v1/models").headers["x-request-id"]


def test_websockets_are_turned_away():
    sent = []

    async def send(message: Any) -> None:
        sent.append(message)

    run(locked()({"type": "websocket", "path": "/health", "headers": []}, None, send))
    assert sent == [{"type": "websocket.close", "code": 1008}]


METRICS = {
    "gauge": {"vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"},
    "counter": {
        "vllm:prefix_cache_queries",
        "vllm:prefix_cache_hits",
        "vllm:num_preemptions",
        "vllm:prompt_tokens",
        "vllm:generation_tokens",
        "vllm:request_success",
        "vllm:admission_rejections",
        "vllm:spec_decode_num_drafts",
        "vllm:spec_decode_num_draft_tokens",
        "vllm:spec_decode_num_accepted_tokens",
    },
    "histogram": {
        "vllm:time_to_first_token_seconds",
        "vllm:inter_token_latency_seconds",
        "vllm:request_time_per_output_token_seconds",
        "vllm:e2e_request_latency_seconds",
        "vllm:request_queue_time_seconds",
        "vllm:request_prefill_time_seconds",
        "vllm:request_decode_time_seconds",
        "vllm:request_prompt_tokens",
        "vllm:request_generation_tokens",
    },
}


def scraped(app: Starlette) -> dict[str, Any]:
    response = call(app, "/metrics")
    assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    return {family.name: family for family in text_string_to_metric_families(response.text)}


def test_metrics_have_vllms_names_types_and_labels():
    app = server(says("the cat sat"))
    app.state.service.gate.draining = True
    chat(app)  # so that every counter has a sample
    families = scraped(app)
    for kind, names in METRICS.items():
        for name in names:
            assert families[name].type == kind, name
            labels = {frozenset(sample.labels) - {"le"} for sample in families[name].samples}
            more = {"vllm:request_success": {"finished_reason"}}.get(name, set())
            expected = {"model_name", "engine"} | more
            assert labels == {frozenset(expected if name != "vllm:admission_rejections" else {"model_name", "reason"})}
    counters = {sample.name for name in METRICS["counter"] for sample in families[name].samples}
    assert {f"{name}_total" for name in METRICS["counter"]} <= counters


def value(families: dict[str, Any], name: str, **labels: str) -> float:
    samples = [sample for family in families.values() for sample in family.samples if sample.name == name]
    return sum(s.value for s in samples if labels.items() <= s.labels.items())


def test_metrics_show_the_engine_and_the_requests():
    engine = says("the cat sat on the mat", cut=2, pause=0.001)
    engine.stats = Stats(3, 4, 5, 10, 100, 60, 7, 1000, 2000, 11, 22, 16)
    app = server(engine)
    chat(app, n=2)
    events(chat(app, stream=True, max_tokens=3))
    families = scraped(app)
    expected = {
        "vllm:num_requests_running": 3,
        "vllm:num_requests_waiting": 4,
        "vllm:kv_cache_usage_perc": 0.5,
        "vllm:prefix_cache_queries_total": 100,
        "vllm:prefix_cache_hits_total": 60,
        "vllm:num_preemptions_total": 7,
        "vllm:prompt_tokens_total": 1000,
        "vllm:generation_tokens_total": 2000,
        "vllm:spec_decode_num_drafts_total": 11,
        "vllm:spec_decode_num_draft_tokens_total": 22,
        "vllm:spec_decode_num_accepted_tokens_total": 16,
        "vllm:time_to_first_token_seconds_count": 3,
        "vllm:inter_token_latency_seconds_count": 5 + 5 + 1,  # behind the first output of two
        "vllm:e2e_request_latency_seconds_count": 3,
        "vllm:request_generation_tokens_sum": 7 + 7 + 3,
        "vllm:request_prompt_tokens_sum": 3 * len(engine.asked[0].prompt),
    }
    assert {name: value(families, name) for name in expected} == expected
    finished = {
        reason: value(families, "vllm:request_success_total", finished_reason=reason) for reason in ("stop", "length")
    }
    assert finished == {"stop": 2, "length": 1}


def test_the_documents_paths_are_the_servers():
    app = server(says("x"))
    document = call(app, "/openapi.json").json()
    assert document["openapi"].startswith("3.1")
    served = {re.sub(r"\{model:path\}", "{model}", route.path) for route in app.routes if isinstance(route, Route)}
    documented = set(document["paths"])
    assert documented <= served
    aliases = {
        path.replace("/v1", prefix, 1) for path in documented if path.startswith("/v1") for prefix in ("", "/beta")
    }
    assert served == documented | aliases
    assert (
        "security" not in document
        and call(locked(), "/openapi.json", Authorization=f"Bearer {KEYS[0]}").json()["security"]
    )


def test_versions_models_and_methods():
    app = server(says("x"))
    assert set(call(app, "/version").json()) == {"version"}
    model = call(app, "/v1/models/tiny").json()
    assert (model["object"], model["id"], model["max_model_len"]) == ("model", "tiny", 1024)
    assert call(app, "/health", method="HEAD").status_code == 200


def test_a_tokenizer_without_chat_tokens_cannot_serve_chats():
    with pytest.raises(UserError):
        server(says("x"), format="kimi-k2")
    assert TOKENIZER.vocab_size == 400

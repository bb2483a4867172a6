"""The OpenAPI 3.1 document, made from the structs that decode requests and encode answers."""

from functools import cache
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from .errors import ErrorBody
from .exchange import Json
from .protocol import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from .responses import ChatCompletion, Detokenized, Model, ModelList, Status, TextCompletion, Tokenized, Version
from .service import VERSION, Service

ERRORS = {
    "400": "The request is wrong.",
    "401": "The key is missing or unknown.",
    "404": "There is no such model.",
    "405": "The path does not take this method.",
    "408": "The body did not come in.",
    "413": "The body is too large.",
    "415": "The body is not JSON.",
    "429": "This key has too many requests under way.",
    "500": "The server or the engine made a mistake.",
    "503": "The queue is full, the server is about to end, or the engine is gone.",
    "504": "The request waited until its time was over.",
}
POSTS = {
    "/v1/chat/completions": ("createChatCompletion", "Answer a chat.", ChatRequest, ChatCompletion, True),
    "/v1/completions": ("createCompletion", "Go on with a text.", CompletionRequest, TextCompletion, True),
    "/tokenize": ("tokenize", "Tokens of a text or a chat.", TokenizeRequest, Tokenized, False),
    "/detokenize": ("detokenize", "Text of tokens.", DetokenizeRequest, Detokenized, False),
}
GETS = {
    "/v1/models": ("listModels", "The models that are served.", ModelList, ("401", "405")),
    "/v1/models/{model}": ("getModel", "One of them.", Model, ("401", "404", "405")),
    "/version": ("version", "The server's version.", Version, ("401", "405")),
    "/health": ("health", "Does the engine live?", Status, ("405",)),
    "/ready": ("ready", "Would a request be taken right now?", Status, ("405",)),
}
PREFIX = "#/components/schemas/"


class OpenApi:
    """Serves the document, made once."""

    def __init__(self, service: Service) -> None:
        self._document = document(bool(service.settings.api_keys), service.settings.open_metrics)

    async def document(self, request: Request) -> Response:
        return Json(self._document)


@cache
def document(keys: bool, open_metrics: bool) -> dict[str, Any]:
    """keys: are any needed?"""
    structs = [row[2] for row in POSTS.values()] + [row[3] for row in POSTS.values()]
    structs += [row[2] for row in GETS.values()] + [ErrorBody]
    _, components = msgspec.json.schema_components(structs, ref_template=PREFIX + "{name}")
    paths: dict[str, Any] = {}
    for path, (name, summary, request, response, streams) in POSTS.items():
        paths[path] = {"post": _post(name, summary, request, response, streams)}
    for path, (name, summary, response, errors) in GETS.items():
        paths[path] = {"get": _get(name, summary, _json(response), errors)}
    paths["/v1/models/{model}"]["get"]["parameters"] = [
        {"name": "model", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
    ]
    for path in ("/health", "/ready"):
        paths[path]["get"]["responses"]["503"] = {"description": "No.", "content": _json(Status)}
        paths[path]["get"]["security"] = []
    text = {"text/plain": {"schema": {"type": "string"}}}
    paths["/metrics"] = {"get": _get("metrics", "Metrics for Prometheus.", text, ("401", "405"))}
    if open_metrics:
        paths["/metrics"]["get"]["security"] = []
    schema = {"application/json": {"schema": {"type": "object"}}}
    paths["/openapi.json"] = {"get": _get("openapi", "This document.", schema, ("401", "405"))}
    made: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {
            "title": "dsv3",
            "version": VERSION,
            "description": "Paths under /v1 are there without it and under /beta, too.",
        },
        "paths": paths,
        "components": {"schemas": components},
    }
    if keys:
        made["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        made["security"] = [{"key": []}]
    return made


def _json(struct: type) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": PREFIX + struct.__name__}}}


def _errors(codes: tuple[str, ...]) -> dict[str, Any]:
    return {code: {"description": ERRORS[code], "content": _json(ErrorBody)} for code in codes}


def _post(name: str, summary: str, request: type, response: type, streams: bool) -> dict[str, Any]:
    content = _json(response)
    if streams:
        event = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
        content["text/event-stream"] = {"schema": event}  # of each of them, as those who check streams read it
    return {
        "operationId": name,
        "summary": summary,
        "requestBody": {"required": True, "content": _json(request)},
        "responses": {"200": {"description": "Done.", "content": content}, **_errors(tuple(ERRORS))},
    }


def _get(name: str, summary: str, content: dict[str, Any], errors: tuple[str, ...]) -> dict[str, Any]:
    return {
        "operationId": name,
        "summary": summary,
        "responses": {"200": {"description": "Done.", "content": content}, **_errors(errors)},
    }

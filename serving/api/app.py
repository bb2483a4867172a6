"""The ASGI application: routes, and what surrounds them."""

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import BaseRoute, Route

from ...core.tokenizer import Tokenizer
from ..messages import EngineClient
from .chat import create_chat
from .completions import create_completion
from .exchange import Post
from .gateway import Gateway, http_error
from .look import Look
from .openapi import OpenApi
from .service import Service
from .settings import Settings
from .tokens import detokenize, tokenize

PREFIXES = ("/v1", "", "/beta")
"""OpenAI's, DeepSeek's, and DeepSeek's for prefixes and gaps, which work here under each of them."""


def create_app(client: EngineClient, tokenizer: Tokenizer, settings: Settings) -> Starlette:
    """The server in front of an engine that is ready. `app.state.service` is what `serve` needs of it.

    Raises UserError if the tokenizer lacks the control tokens of the chat format.
    """
    service = Service(client, tokenizer, settings)
    look = Look(service)
    routes: list[BaseRoute] = []
    for prefix in PREFIXES:
        routes += [
            Route(f"{prefix}/chat/completions", Post(service, create_chat), methods=["POST"]),
            Route(f"{prefix}/completions", Post(service, create_completion), methods=["POST"]),
            Route(f"{prefix}/models", look.models),
            Route(f"{prefix}/models/{{model:path}}", look.model),
        ]
    routes += [
        Route("/tokenize", Post(service, tokenize), methods=["POST"]),
        Route("/detokenize", Post(service, detokenize), methods=["POST"]),
        Route("/health", look.health),
        Route("/ready", look.ready),
        Route("/metrics", look.metrics),
        Route("/version", look.version),
        Route("/openapi.json", OpenApi(service).document),
    ]
    middleware = [Middleware(Gateway, service=service)]
    if settings.cors_origins:
        cors = Middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type", "X-Request-Id"],
            expose_headers=["X-Request-Id", "Retry-After"],
        )
        middleware.insert(0, cors)
    app = Starlette(routes=routes, middleware=middleware, exception_handlers={HTTPException: http_error})
    app.router.redirect_slashes = False
    app.state.service = service
    return app

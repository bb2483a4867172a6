"""What can be looked at: models, health, readiness, metrics, the version."""

import time

from starlette.requests import Request
from starlette.responses import Response

from .errors import NotFound
from .exchange import Json
from .metrics import CONTENT_TYPE
from .responses import Model, ModelList, Status, Version
from .service import VERSION, Service


class Look:
    """The GET routes of a server."""

    def __init__(self, service: Service) -> None:
        self._service, self._since = service, int(time.time())

    async def models(self, request: Request) -> Response:
        return Json(ModelList("list", [self._model(name) for name in self._service.settings.models]))

    async def model(self, request: Request) -> Response:
        name = request.path_params["model"]
        if name not in self._service.settings.models:
            raise NotFound("there is no model of this name; GET /v1/models lists them", "model", "model_not_found")
        return Json(self._model(name))

    def _model(self, name: str) -> Model:
        return Model(name, "model", self._since, "dsv3", self._service.model, self._service.window)

    async def health(self, request: Request) -> Response:
        """Does the engine live? One that does not will not come back: the process is to be restarted."""
        alive = self._service.client.alive
        return Json(Status("ok" if alive else "engine_dead"), 200 if alive else 503)

    async def ready(self, request: Request) -> Response:
        """Would a request be taken right now?"""
        service = self._service
        if not service.client.alive:
            return Json(Status("engine_dead"), 503)
        if service.gate.draining:
            return Json(Status("draining"), 503)
        return Json(Status("queue_full"), 503) if service.gate.full else Json(Status("ok"))

    async def metrics(self, request: Request) -> Response:
        return Response(self._service.metrics.page(), headers={"Content-Type": CONTENT_TYPE})

    async def version(self, request: Request) -> Response:
        return Json(Version(VERSION))

"""/v1/admin: what only the owner of the key may do, because it names files of this machine."""

import asyncio
from functools import partial
from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict

from diffquant.errors import DiffquantError
from diffquant.serve.refusals import Refused, of_failure
from diffquant.serve.service import Service


class Switch(BaseModel):
    """POST /v1/admin/model: what of the model is to be another; null takes an override away."""

    model_config = ConfigDict(extra="forbid", strict=True)

    transformer_path: str | None = None
    transformer_weights_path: str | None = None
    component_paths: dict[str, str] | None = None
    component_weights_paths: dict[str, str] | None = None
    quantization: str | None = None
    lora: list[str] | None = None

    def changes(self) -> dict[str, Any]:
        """The fields that were said; what was null becomes what it is when nobody types it."""
        said = {name: getattr(self, name) for name in self.model_fields_set}
        said |= {name: {} for name in _BY_COMPONENT if said.get(name, ()) is None}
        return said | ({"lora": tuple(said["lora"] or ())} if "lora" in said else {})


_BY_COMPONENT = ("component_paths", "component_weights_paths")


def router(service: Service) -> APIRouter:
    """The routes of the owner."""
    routes = APIRouter(prefix="/v1/admin", tags=["admin"])

    @routes.post("/model", summary="Another override or other LoRAs, between two requests")
    async def model(body: Switch) -> dict[str, Any]:
        _require_key(service)
        service.require_alone("a switch reaches one process", "serve again with the other model")
        if service.resolve is None:
            raise Refused(501, "this server was not started from the command line")
        if not body.model_fields_set:
            raise Refused(400, "nothing is to be another", code="missing_value")
        try:
            origin = await asyncio.to_thread(service.resolve, body.changes())
        except DiffquantError as error:
            refused = of_failure(error)
            raise Refused(400, refused.message, code="invalid_value") from error
        switched = service.line.between_jobs(partial(service.engine.switch, origin))
        try:
            await asyncio.wrap_future(switched)
        except DiffquantError as error:
            raise Refused(400, f"the former model is back: {error}", code="not_loaded") from error
        return service.info()

    return routes


def _require_key(service: Service) -> None:
    # The gate has asked for the key already, where there is one.
    if service.settings.api_key is None:
        raise Refused(
            403, "who may switch models cannot be told apart: start the server with --api-key"
        )

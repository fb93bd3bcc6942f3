"""What is served: model, plan, truth lines, limits."""

from typing import Any

from fastapi import APIRouter

from diffquant.plan import LayerPlan
from diffquant.serve.bodies import named
from diffquant.serve.service import Service


def router(service: Service) -> APIRouter:
    """Model, plan and server."""
    routes = APIRouter(tags=["about"])

    @routes.get("/server_info", summary="Model, truth lines, defaults, limits, queue")
    async def server_info() -> dict[str, Any]:
        return service.info()

    @routes.get("/v1/plan", summary="The kernel of every layer and why it is stored as it is")
    async def plan() -> dict[str, Any]:
        report = service.facts.report
        layers = {
            name: [_layer(layer) for layer in plan.layers] for name, plan in report.plans.items()
        }
        return {**report.to_json(), "layers": layers}

    @routes.get("/v1/models", summary="The one model that is served")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(service)]}

    @routes.get("/v1/models/{name:path}", summary="The model, when it is this one")
    async def model(name: str) -> dict[str, Any]:
        named(name, service.model)
        return _model(service)

    return routes


def _model(service: Service) -> dict[str, Any]:
    return {
        "id": service.model,
        "object": "model",
        "created": service.created,
        "owned_by": "diffquant",
    }


def _layer(layer: LayerPlan) -> dict[str, Any]:
    return {
        "path": layer.path,
        "shape": list(layer.shape_NK),
        "pieces": [str(piece.runs_as) for piece in layer.pieces],
        "why": layer.why,
    }

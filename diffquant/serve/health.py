"""How the server is: alive, ready, and in Prometheus' numbers."""

from dataclasses import asdict

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

from diffquant.serve.service import Service


def router(service: Service) -> APIRouter:
    """Health, readiness, metrics."""
    routes = APIRouter(tags=["health"])

    @routes.get("/health", summary="Whether the process and its worker live")
    async def health() -> Response:
        alive = service.line.is_alive
        return JSONResponse({"status": "ok" if alive else "failed"}, 200 if alive else 503)

    @routes.get("/ready", summary="Whether pictures can be drawn, and every kernel is right")
    async def ready() -> Response:
        facts = service.engine.facts
        if facts is None or not service.line.is_alive:
            failure = service.line.failure
            why = "the model is being loaded" if failure is None else "the model cannot be served"
            return JSONResponse({"status": "not ready", "why": why}, 503)
        checks = [{**asdict(check), "ok": check.ok} for check in facts.checks]
        return JSONResponse({"status": "ready", "loaded": service.line.is_open, "checks": checks})

    @routes.get("/metrics", summary="For Prometheus")
    async def metrics() -> Response:
        service.require_alone("these are one process's numbers", "Ray exports all of theirs")
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    return routes

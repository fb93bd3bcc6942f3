"""/v1/jobs: where a request stands, and how to stop it."""

from typing import Any

from fastapi import APIRouter, Depends

from diffquant.serve.refusals import Refused
from diffquant.serve.service import Service


def router(service: Service) -> APIRouter:
    """The routes of jobs, by their id or by the X-Request-Id of who asked."""

    def alone() -> None:
        service.require_alone(
            "a job is known to who draws it", "closing the connection stops a request"
        )

    routes = APIRouter(prefix="/v1/jobs", tags=["jobs"], dependencies=[Depends(alone)])

    @routes.get("/{name}", summary="Where a request stands: state, step, position")
    async def job(name: str) -> dict[str, Any]:
        found = service.line.find(name)
        if found is not None:
            return {
                **found.to_json(),
                "position": service.line.position(found),
                "seconds_left": round(service.line.seconds_left(found), 1),
            }
        return _past(service, name)

    @routes.delete("/{name}", summary="Stop a request at its next step")
    async def stop(name: str) -> dict[str, Any]:
        found = service.line.find(name)
        if found is None:
            return {**_past(service, name), "stopped": False}
        service.line.stop(found, "cancelled")
        return {**found.to_json(), "stopped": True}

    return routes


def _past(service: Service, name: str) -> dict[str, Any]:
    past = service.line.past(name)
    if past is None:
        raise Refused(404, f"there is no job {name[:80]!r}", param="job", code="not_found")
    return dict(past)

"""Answers that are no object: what went wrong, in the words of Kubernetes."""

import json
from typing import Any

from aiohttp import web

_CODES: dict[str, type[web.HTTPException]] = {
    "BadRequest": web.HTTPBadRequest,
    "NotFound": web.HTTPNotFound,
    "AlreadyExists": web.HTTPConflict,
    "Conflict": web.HTTPConflict,
    "Expired": web.HTTPGone,
    "Invalid": web.HTTPUnprocessableEntity,
    "MethodNotAllowed": web.HTTPMethodNotAllowed,
    "UnsupportedMediaType": web.HTTPUnsupportedMediaType,
    "TooManyRequests": web.HTTPTooManyRequests,
}


def refused(reason: str, message: str, **details: Any) -> web.HTTPException:
    """Return what to raise when a request cannot be served; `reason` decides the HTTP status."""
    kind = _CODES[reason]
    body = {
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
        "message": message, "reason": reason, "details": details, "code": kind.status_code,
    }  # fmt: skip
    text, content_type = json.dumps(body), "application/json"
    if kind is web.HTTPMethodNotAllowed:
        return web.HTTPMethodNotAllowed("?", ["GET"], text=text, content_type=content_type)
    return kind(text=text, content_type=content_type)


def missing(plural: str, name: str) -> web.HTTPException:
    """Return the 404 of one object."""
    return refused("NotFound", f'{plural} "{name}" not found', name=name, kind=plural)

"""The OpenAPI description of the server, from the models that read its requests."""

from collections.abc import Mapping
from typing import Any

from step35 import __version__
from step35.server.api.protocol import ApiModule

_TOKENS = {"type": "array", "items": {"type": "integer", "minimum": 0}}
_TOKENIZE = {
    "type": "object",
    "properties": {"content": {"type": "string"}, "add_special": {"type": "boolean"}},
    "required": ["content"],
}
_DETOKENIZE = {"type": "object", "properties": {"tokens": _TOKENS}, "required": ["tokens"]}
_STATUS = {
    "200": "The answer; a stream of server-sent events if the request says stream.",
    "400": "The request is wrong.",
    "401": "The API key is wrong.",
    "403": "The request comes from a page of another site.",
    "405": "The path has other methods.",
    "413": "The request is too large.",
    "415": "The body is packed.",
    "429": "Too many requests wait.",
    "503": "The server is loading or draining.",
}


def description(apis: Mapping[str, ApiModule]) -> dict[str, Any]:
    """Returns the description; `apis` are the modules that read the bodies, by path."""
    schemas: dict[str, Any] = {}
    paths: dict[str, Any] = {
        path: {"post": _operation(path, _request(path, api, schemas))} for path, api in apis.items()
    }
    paths["/tokenize"] = {"post": _operation("/tokenize", _TOKENIZE)}
    paths["/detokenize"] = {"post": _operation("/detokenize", _DETOKENIZE)}
    paths["/v1/embeddings"] = {"post": _operation("/v1/embeddings", {"type": "object"}, {"501": "Not supported."})}
    for path in ("/v1/models", "/health", "/status", "/metrics", "/openapi.json"):
        paths[path] = {"get": _operation(path)}
    return {
        "openapi": "3.1.0",
        "info": {"title": "step35", "version": __version__},
        "security": [{"bearer": []}, {"key": []}, {}],
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
    }


def _operation(path: str, body: dict[str, Any] | None = None, more: dict[str, str] | None = None) -> dict[str, Any]:
    statuses = _STATUS | (more or {})
    operation: dict[str, Any] = {
        "operationId": path.strip("/").replace("/", "_").replace(".", "_") or "page",
        "responses": {status: {"description": text} for status, text in statuses.items()},
    }
    if body is not None:
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": body}}}
    return operation


def _request(path: str, api: ApiModule, schemas: dict[str, Any]) -> dict[str, Any]:
    """Adds the models of a request to the schemas, under names of their own, and returns the request's."""
    name = path.strip("/").replace("/", "_")
    template = f"#/components/schemas/{name}_{{model}}"
    schema = api.REQUEST_BODY.model_json_schema(ref_template=template)
    schemas.update({f"{name}_{model}": part for model, part in schema.pop("$defs", {}).items()})
    return schema

"""The endpoints that tell: models, health, readiness, load, version, the tokenizer, metrics, and the description of all."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

import sparseray
from sparseray.jobs.http.api_error import ApiError, error_response
from sparseray.jobs.http.constraints import read_tools
from sparseray.jobs.http.endpoints import GenerateEndpoints
from sparseray.jobs.http.fields import DETOKENIZE, TOKENIZE, Values, read_fields
from sparseray.jobs.http.generation_client import GenerationClient
from sparseray.jobs.http.openai_bodies import ServedModel, encode_chat
from sparseray.jobs.http.openapi import describe
from sparseray.jobs.http.prompts import PromptReader

VERSION = sparseray.__version__


def _state(reason: str) -> Response:
    """All is well, or why it is not."""
    if reason:
        return JSONResponse({"status": "down", "reason": reason}, status_code=503)
    return JSONResponse({"status": "ok"})


class InformationEndpoints:
    """What a server says of itself.

    Args:
        client: the engine.
        served: the model.
        generate: the endpoints that generate.
        metrics: gives the Prometheus exposition text; runs in a thread.
        root_path: path under which a proxy shows the server.
    """

    def __init__(
        self,
        client: GenerationClient,
        served: ServedModel,
        generate: GenerateEndpoints,
        metrics: Callable[[], bytes],
        root_path: str,
    ) -> None:
        self._client, self._served, self._generate, self._metrics = client, served, generate, metrics
        self._created_s, self._root_path = int(time.time()), root_path

    def _card(self, name: str) -> dict[str, Any]:
        permission = {
            "id": f"modelperm-{name}",
            "object": "model_permission",
            "created": self._created_s,
            "allow_create_engine": False,
            "allow_sampling": True,
            "allow_logprobs": True,
            "allow_search_indices": False,
            "allow_view": True,
            "allow_fine_tuning": False,
            "organization": "*",
            "group": None,
            "is_blocking": False,
        }
        return {
            "id": name,
            "object": "model",
            "created": self._created_s,
            "owned_by": "sparseray",
            "root": self._served.names[0],
            "parent": None,
            "max_model_len": self._served.limits.max_model_len,
            "version": self._client.version() or None,
            "permission": [permission],
        }

    async def models(self, _: Request) -> Response:
        """List the names of the model."""
        return JSONResponse({"object": "list", "data": [self._card(name) for name in self._served.names]})

    async def one_model(self, request: Request) -> Response:
        """Describe one name."""
        return JSONResponse(self._card(self._served.named({"model": request.path_params["model"]})))

    async def health(self, _: Request) -> Response:
        """Say whether the server lives; one that does not never will again."""
        return _state(self._client.failure)

    async def ready(self, _: Request) -> Response:
        """Say whether requests are taken, and an engine answers."""
        return _state(self._generate.refusal or self._client.reason)

    async def ping(self, _: Request) -> Response:
        """Answer that the server is there, engine or not."""
        return Response(status_code=200)

    async def load(self, _: Request) -> Response:
        """Count the requests that are being answered."""
        return JSONResponse({"server_load": self._generate.num_open})

    async def version(self, _: Request) -> Response:
        """Name the version of the package."""
        return JSONResponse({"version": VERSION})

    async def openapi(self, _: Request) -> Response:
        """Describe every endpoint."""
        return JSONResponse(describe(self._served.fields, VERSION, self._root_path))

    async def metrics(self, _: Request) -> Response:
        """Give the metrics to Prometheus."""
        try:
            data = await asyncio.to_thread(self._metrics)
        except Exception as error:
            return error_response(error)
        return Response(data, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def tokenize(self, request: Request) -> Response:
        """Turn a text or a conversation into token ids."""
        try:
            return JSONResponse(await self._generate.read(request, self._tokenized))
        except Exception as error:
            return error_response(error)

    def _tokenized(self, body: Mapping[str, Any]) -> dict[str, Any]:
        served = self._served
        served.named(body)
        values = read_fields(body, TOKENIZE, served.fields, ignore_unknown=served.ignore_unknown)
        reader = PromptReader(served.vocabulary, served.limits)
        if ("prompt" in values.body) == ("messages" in values.body):
            raise ApiError(400, "give either prompt or messages", param="prompt")
        if "messages" in values.body:
            shown = Values({**values.body, "tool_choice": "none"})
            tools = read_tools(shown, served.limits, template_takes_tools=served.template.takes_tools)
            tokens = encode_chat(values, tools, served, reader)
        else:
            prompt = values.get("prompt")
            if not isinstance(prompt, str):
                raise ApiError(400, "prompt must be a text", param="prompt")
            begin = served.vocabulary.begin if values.get("add_special_tokens", True) else ()
            tokens = (*begin, *served.vocabulary.encode(reader.bounded(prompt, "prompt")))
        strings = [served.vocabulary.label(token) for token in tokens]
        return {
            "count": len(tokens),
            "max_model_len": served.limits.max_model_len,
            "tokens": list(tokens),
            "token_strs": strings if values.get("return_token_strs", False) else None,
        }

    async def detokenize(self, request: Request) -> Response:
        """Turn token ids into text."""
        try:
            return JSONResponse(await self._generate.read(request, self._detokenized))
        except Exception as error:
            return error_response(error)

    def _detokenized(self, body: Mapping[str, Any]) -> dict[str, Any]:
        served = self._served
        served.named(body)
        values = read_fields(body, DETOKENIZE, served.fields, ignore_unknown=served.ignore_unknown)
        tokens = values.get("tokens", [])
        if not all(type(token) is int for token in tokens):
            raise ApiError(400, "tokens must be token ids", param="tokens")
        reader = PromptReader(served.vocabulary, served.limits)
        return {"prompt": served.vocabulary.token_text(reader.ids(tokens, "tokens"))}

    async def tokenizer_info(self, _: Request) -> Response:
        """Describe the tokenizer as a tokenizer_config.json does."""
        vocabulary = self._served.vocabulary
        return JSONResponse(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "vocab_size": self._served.limits.vocab_size,
                "model_max_length": self._served.limits.max_model_len,
                "eos_token": vocabulary.token_text([vocabulary.eos_id]),
                "eos_token_id": vocabulary.eos_id,
                "add_bos_token": bool(vocabulary.begin),
                "chat_template": self._served.template.source,
            }
        )

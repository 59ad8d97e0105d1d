# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Read the images of a request: a file, several files of a form, or base64 in JSON."""

import asyncio
import base64
import binascii
import json
from typing import Any

from ..extras import require_extra


try:
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect, Request
except ImportError:
    require_extra("serve", "`hf_scan.serving.bodies`")
    raise


READ_SECONDS = 30.0  # for a whole body


class ByteBudget:
    """
    The bytes of bodies that are held at the same time.

    Args:
        per_request (`int`): The most bytes of one body.
        in_all (`int`): The most of all of them.
    """

    def __init__(self, per_request: int, in_all: int) -> None:
        self.per_request, self.in_all = per_request, in_all
        self.held = 0

    async def read(self, request: Request) -> bytes:
        """
        Return the body of a request. The caller gives its length back to `held` when it is done with it.

        Raises:
            `HTTPException`: 413 if it is too large, 503 if there is no room, and 408 if it takes too long.
            `ClientDisconnect`: if the client hangs up.
        """
        length = request.headers.get("content-length", "0")
        if length.isdecimal() and int(length) > self.per_request:
            raise self._too_large()
        body = bytearray()
        try:
            await asyncio.wait_for(self._collect(request, body), READ_SECONDS)
        except BaseException as error:
            self.held -= len(body)
            if isinstance(error, asyncio.TimeoutError):
                raise HTTPException(408, f"The request was not sent within {READ_SECONDS:g} seconds.") from error
            raise
        return bytes(body)

    async def _collect(self, request: Request, body: bytearray) -> None:
        async for chunk in request.stream():
            body += chunk
            self.held += len(chunk)
            if len(body) > self.per_request:
                raise self._too_large()
            if self.held > self.in_all:
                raise HTTPException(503, "Too many images are being sent. Try again.", {"Retry-After": "1"})

    def _too_large(self) -> HTTPException:
        return HTTPException(413, f"The request has more than the {self.per_request} bytes that are accepted.")


async def files_of(request: Request, body: bytes, max_images: int) -> list[bytes]:
    """
    Return the image files in a body.

    Args:
        request (`Request`): The request, of whose headers the kind of the body is read.
        body (`bytes`): Its body.
        max_images (`int`): The most images.

    Raises:
        `HTTPException`: 400 if it is not what it says, 413 for too many images, and 415 for another kind.
    """
    kind = request.headers.get("content-type", "application/octet-stream").partition(";")[0].strip().lower()
    if not body:
        raise HTTPException(400, "The request is empty; expected an image file, or base64 of some in JSON.")
    if kind == "application/octet-stream" or kind.startswith("image/"):
        return [body]
    if kind == "application/json":
        return await asyncio.to_thread(_files_of_json, body, max_images)
    if kind == "multipart/form-data":
        return await _files_of_form(request, body, max_images)
    raise HTTPException(
        415, f"The request is of type {kind[:80]!r}; expected an image, multipart/form-data or application/json."
    )


def _files_of_json(body: bytes, max_images: int) -> list[bytes]:
    try:
        given = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, "The request is no JSON, though it says so.") from error
    if not isinstance(given, dict) or len(given.keys() & {"image", "images"}) != 1:
        raise HTTPException(400, 'Expected {"image": "..."} or {"images": ["...", ...]}, each in base64.')
    images = given["images"] if "images" in given else [given["image"]]
    if not isinstance(images, list) or not images or not all(isinstance(image, str) for image in images):
        raise HTTPException(400, "Expected a list of at least one image in base64.")
    _check_count(len(images), max_images)
    return [_decoded(image, position) for position, image in enumerate(images)]


def _decoded(text: str, position: int) -> bytes:
    if text.startswith("data:"):
        text = text.partition(",")[2]
    if text[:8].lower().startswith(("http://", "https://", "file://")):
        raise HTTPException(400, f"Image {position} is an address; expected base64. The server fetches nothing.")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise HTTPException(400, f"Image {position} is no base64.") from error


async def _files_of_form(request: Request, body: bytes, max_images: int) -> list[bytes]:
    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    # The parser counts too, so that no form holds more files than are ever counted here.
    again, most = Request(request.scope, receive), 10 * max_images
    try:
        async with again.form(max_files=most, max_fields=100) as form:
            files = [value for _, value in form.multi_items() if not isinstance(value, str)]
            if not files:
                raise HTTPException(400, "The form has no files; expected at least one image file.")
            _check_count(len(files), max_images)
            return [await file.read() for file in files]
    except HTTPException as error:
        if "too many files" not in error.detail.lower():
            raise
        raise HTTPException(
            413, f"The request has more than {most} images, and {max_images} are accepted at a time."
        ) from error


def _check_count(count: int, max_images: int) -> None:
    if count > max_images:
        raise HTTPException(413, f"The request has {count} images, more than the {max_images} that are accepted.")


__all__ = ["ByteBudget", "ClientDisconnect", "files_of"]

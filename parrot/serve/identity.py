"""Whose a request on OpenAI's routes is: its tenant, and the program that it is a call of.

With keys configured the key says the tenant, and nothing else does. Without, nobody is proven to be anybody: then the tenant
is whom the request says it is from, since that decides no more than with whom contexts are shared and under whose limits work
counts.
"""

from __future__ import annotations

from typing import NamedTuple

from aiohttp import web

from parrot.protocol.openai_checks import refusal
from parrot.serve.keys import Keys

TENANT = "X-Parrot-Tenant"
PROGRAM = "X-Parrot-Program"
MOST_CHARACTERS = 256
#: A shorter key is a placeholder ("EMPTY", "none", "sk-no-key-required"), which strangers have in common: it is taken for none.
LEAST_SECRET = 20


class Identity(NamedTuple):
    """`tenant` "": nobody's, so that only a system message is shared. `program` "": the request is a program of its own."""

    tenant: str
    program: str


def identity_of(request: web.BaseRequest, keys: Keys) -> Identity:
    """Raises `unauthorized`, `invalid_api_key`, and `bad_request` for a header that is no name."""
    program = _name(request, PROGRAM)
    authorization = request.headers.get("Authorization")
    if keys.required:
        return Identity(keys.tenant(authorization), program)
    tenant = _name(request, TENANT)
    if not tenant and authorization is not None and len(authorization.partition(" ")[2].strip()) >= LEAST_SECRET:
        tenant = keys.tenant(authorization)
    return Identity(tenant, program)


def _name(request: web.BaseRequest, header: str) -> str:
    name = request.headers.get(header, "")
    if name and not (len(name) <= MOST_CHARACTERS and name.isascii() and name.isprintable()):
        raise refusal(f"Invalid header '{header}': 1 to {MOST_CHARACTERS} printable ASCII characters are accepted.", header)
    return name

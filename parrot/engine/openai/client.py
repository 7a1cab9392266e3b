"""The official client of a remote endpoint, made from an engine's file; imported only by engines that need it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from parrot.configuration import ConfigurationError
from parrot.engine.config import OpenAIEngineConfig

if TYPE_CHECKING:
    from openai import AsyncOpenAI

#: What is sent as the key where the file has none: servers of one's own ask for none, the client does.
NO_KEY = "none"


def make_client(config: OpenAIEngineConfig) -> AsyncOpenAI:
    """The client. It tries nothing again by itself. Raises ConfigurationError, in one line that names the key."""
    check(config)
    key = api_key_of(config)
    try:
        from openai import AsyncAzureOpenAI, AsyncOpenAI
    except ImportError as error:
        raise ConfigurationError(
            "engine_type 'openai' needs the package openai, which is not installed: pip install 'parrot-testbed[openai]'"
        ) from error
    instance = config.instance
    if instance.is_azure:
        return AsyncAzureOpenAI(
            azure_endpoint=_with_scheme(instance.azure_endpoint or ""),
            azure_deployment=config.model,
            api_version=instance.azure_api_version,
            api_key=key,
            max_retries=0,
            timeout=instance.timeout,
        )
    return AsyncOpenAI(api_key=key or NO_KEY, base_url=instance.base_url, max_retries=0, timeout=instance.timeout)


def check(config: OpenAIEngineConfig) -> None:
    """Raises ConfigurationError for keys of `instance` that do not fit together."""
    instance = config.instance
    if instance.is_azure:
        for name in ("azure_endpoint", "azure_api_version", "api_key"):
            if not getattr(instance, name):
                raise ConfigurationError(f"missing key 'instance.{name}': is_azure is true")
        if instance.base_url is not None:
            raise ConfigurationError("key 'instance.base_url' is for endpoints that are not Azure's; use azure_endpoint")
    else:
        for name in ("azure_endpoint", "azure_api_version"):
            if getattr(instance, name) is not None:
                raise ConfigurationError(f"key 'instance.{name}' is given, but is_azure is false")
        if instance.base_url is None and not instance.api_key:
            raise ConfigurationError("missing key 'instance.api_key' (or 'instance.base_url', of a server of your own)")
        if instance.base_url is not None and not instance.base_url.startswith(("http://", "https://")):
            message = "expected a URL that begins with http:// or https://"
            raise ConfigurationError(f"key 'instance.base_url' is {instance.base_url!r}; {message}")
    if instance.send_token_ids and instance.api_endpoint == "chat":
        raise ConfigurationError(
            "key 'instance.send_token_ids' is true, but api_endpoint 'chat' takes no ids; use 'completion'"
        )
    if instance.return_token_ids and not instance.send_token_ids:
        raise ConfigurationError("key 'instance.return_token_ids' is true, but send_token_ids is false: ids would be of no use")
    if instance.send_token_ids and config.tokenizer is None:
        raise ConfigurationError("key 'instance.send_token_ids' is true: name the model's 'tokenizer'")


def _with_scheme(endpoint: str) -> str:
    """Azure's endpoints are often written without it."""
    return endpoint if "://" in endpoint else f"https://{endpoint}"


def api_key_of(config: OpenAIEngineConfig) -> str | None:
    """The key itself. Raises ConfigurationError when `env:NAME` names no variable."""
    key = config.instance.api_key
    if key is None or not key.startswith("env:"):
        return key
    name = key.removeprefix("env:")
    if not os.environ.get(name):
        raise ConfigurationError(f"key 'instance.api_key' is {key!r}, but the environment has no {name}")
    return os.environ[name]

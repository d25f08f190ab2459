"""Addresses of servers, and the environment's variables of proxies and certificates."""

import ipaddress
import os
import re
import urllib.request
from collections.abc import Mapping
from urllib.parse import urlsplit

from nla_jax.errors import UserError

PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")  # in small letters too
CERTIFICATES = ("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "PIP_CERT")


def is_loopback(host: str) -> bool:
    """Return whether a host name or address is this machine's own."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost" or host.lower().endswith(".localhost")


def check_url(url: str) -> str:
    """Return the address of a server. Raises UserError if it is none, or holds more than an address."""
    # Messages do not repeat the URL, because it may contain a password.
    try:
        parts = urlsplit(url)
        fits = parts.scheme in ("http", "https") and parts.hostname and (parts.port or 1)
    except ValueError:
        fits = False
    if not fits or re.search(r"\s", url):
        raise UserError("the base URL is not an address such as http://127.0.0.1:8000/v1")
    if parts.username or parts.password or parts.query or parts.fragment or "@" in parts.netloc:
        raise UserError(f"the base URL of {parts.hostname} holds more than an address: keys and passwords "
                        "come from the environment (--key-env NAME)")
    return url


def client_settings(url: str) -> dict:
    """Return arguments of httpx2's client: a loopback address is asked without a proxy, with certificates."""
    parts = urlsplit(url)
    if not is_loopback(parts.hostname or ""):
        return {}
    import httpx2

    return {"trust_env": False} | ({"verify": httpx2.create_ssl_context()} if parts.scheme == "https" else {})


def hide_passwords(text: str) -> str:
    """Replace what is before an @ in a text with addresses."""
    return re.sub(r"[^\s/'\"=(]+@", "[password]@", text)


def hint(error: object = "", env: Mapping[str, str] | None = None) -> str:
    """Return a clause for an error of the network, with the environment's variables that may cause it, or "".

    These are proxies, files of certificates that do not exist, and all such files if the error names them.
    """
    env = os.environ if env is None else env
    every = re.search("ssl|tls|certificate", str(error), re.IGNORECASE)
    named = [name for upper in PROXIES for name in (upper, upper.lower()) if env.get(name)]
    said = [f"{name}={hide_passwords(env[name])}" for name in named]
    said += [
        f"{name}={env[name]}" + ("" if os.path.exists(env[name]) else " (which does not exist)")
        for name in CERTIFICATES if env.get(name) and (every or not os.path.exists(env[name]))
    ]
    return f"; the environment sets {', '.join(said)}: correct or unset it if it is wrong" if said else ""


def proxy_of(url: str) -> str:
    """Return "NAME=PROXY", the variable of the proxy through which a client asks for `url`, or ""."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    if is_loopback(host) or urllib.request.proxy_bypass(host):
        return ""
    for variable in (f"{parts.scheme}_proxy", "all_proxy"):
        for name in (variable, variable.upper()):
            if os.environ.get(name):
                return f"{name}={hide_passwords(os.environ[name])}"
    return ""


def keep_grpc_off_proxies(address: str) -> None:
    """Make gRPC, with which jax's processes find each other, use no proxy for a loopback address."""
    host = address.rpartition(":")[0]
    # These are gRPC's own variables. Without them there is no proxy, and jax warns of any variable.
    if is_loopback(host) and any(os.environ.get(f"{name}_proxy") for name in ("grpc", "https", "http")):
        known = os.environ.get("no_grpc_proxy") or os.environ.get("no_proxy") or ""
        os.environ["no_grpc_proxy"] = ",".join(filter(None, (known, host.strip("[]"))))

"""The chat page at `/`: one file without a build step, which loads nothing from anywhere."""

from __future__ import annotations

import base64
import functools
import hashlib
import importlib.resources
import re

from starlette.responses import Response

__all__ = ["page"]


@functools.cache
def page() -> Response:
    """The page, with a policy under which no script or style but its own ever runs."""
    text = importlib.resources.files(__package__).joinpath("page.html").read_text("utf-8")
    policy = [
        "default-src 'none'",
        f"script-src {_hash(text, 'script')}",
        f"style-src {_hash(text, 'style')}",
        "connect-src 'self'",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
    headers = {
        "Content-Security-Policy": "; ".join(policy),
        "X-Content-Type-Options": "nosniff",
        "X-Frame-Options": "DENY",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-store",
    }
    return Response(text, media_type="text/html", headers=headers)


def _hash(text: str, tag: str) -> str:
    """How a Content-Security-Policy names the one inline element of a kind."""
    (inner,) = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(inner.encode()).digest()).decode()}'"

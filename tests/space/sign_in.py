"""Hugging Face's sign-in for a Space, on this machine: an OpenID provider that says yes at once."""

from __future__ import annotations

import json
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlencode, urlsplit

from joserfc import jwt
from joserfc.jwk import RSAKey

CLIENT, CLIENT_SECRET = "the-space", "the-secret-of-the-space"


@contextmanager
def provider(user: str, token: str) -> Iterator[tuple[str, list[str]]]:
    """Give the provider's address, and the scopes that it was asked for; everybody is `user`, and gets the token."""
    key, scopes, nonces = RSAKey.generate_key(2048, {"kid": "one", "alg": "RS256", "use": "sig"}), [], {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked, query = urlsplit(self.path), parse_qs(urlsplit(self.path).query)
            if asked.path == "/oauth/authorize":
                code = secrets.token_hex(8)
                nonces[code] = query["nonce"][0]
                scopes.append(query["scope"][0])
                self.send_response(302)
                more = urlencode({"code": code, "state": query["state"][0]})
                address = query["redirect_uri"][0]
                self.send_header("Location", f"{address}{'&' if '?' in address else '?'}{more}")
                self.end_headers()
            elif asked.path == "/jwks":
                self.answer({"keys": [key.as_dict(private=False)]})
            else:
                self.answer({
                    "issuer": url, "authorization_endpoint": f"{url}/oauth/authorize", "jwks_uri": f"{url}/jwks",
                    "token_endpoint": f"{url}/oauth/token", "id_token_signing_alg_values_supported": ["RS256"],
                })  # fmt: skip

        def do_POST(self) -> None:
            form = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
            now = int(time.time())
            claims = {
                "iss": url, "aud": CLIENT, "sub": "1", "iat": now, "exp": now + 600, "nonce": nonces[form["code"][0]],
                "name": user, "preferred_username": user, "profile": f"{url}/{user}", "picture": f"{url}/{user}.png",
            }  # fmt: skip
            signed = jwt.encode({"alg": "RS256", "kid": "one"}, claims, key)
            self.answer({"access_token": token, "token_type": "bearer", "expires_in": 600, "id_token": signed,
                         "scope": scopes[-1]})  # fmt: skip

        def answer(self, document: object) -> None:
            content = json.dumps(document).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield url, scopes
    finally:
        server.shutdown()
        server.server_close()

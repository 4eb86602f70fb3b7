"""Ask a fine-tuned model that serve.py serves, or any other server with an OpenAI API.

python nim_lora/chat.py "What is a checkpoint?"
python nim_lora/chat.py --list
"""

import argparse
import sys
import time
import urllib.error
import urllib.request
from urllib.parse import urlsplit

from openai import APIConnectionError, APIStatusError, DefaultHttpxClient, OpenAI

HEALTH = ("/v1/health/ready", "/health")  # of NIM; of transformers serve
PATIENCE = 1800  # seconds to wait for a server that is loading
NOBODY = 60  # and for one that does not even listen


class ChatError(Exception):
    """There is no answer; the message says why and what to do."""


def is_local(url: str) -> bool:
    return urlsplit(url).hostname in ("127.0.0.1", "localhost", "::1")


def client_for(url: str) -> OpenAI:
    """A client for a server without a key. A proxy of the environment is not asked for this machine's own addresses."""
    # without api_key it would send the OPENAI_API_KEY of the environment to the server
    return OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600,
                  http_client=DefaultHttpxClient(trust_env=not is_local(url)))  # fmt: skip


def readiness(url: str) -> str:
    """What the server says about itself: "ready", "absent" when nobody listens, otherwise what it said instead."""
    opener = urllib.request.build_opener(*[urllib.request.ProxyHandler({})] * is_local(url))
    said = ""
    for page in HEALTH:
        try:
            with opener.open(url + page, timeout=10):
                return "ready"
        except urllib.error.HTTPError as error:
            said = f"HTTP {error.code}"
            if error.code != 404:
                return said
        except urllib.error.URLError as error:
            broke = isinstance(error.reason, (ConnectionResetError, TimeoutError))
            return str(error.reason) if broke else "absent"
        except OSError as error:  # docker listens before the server in it does, and breaks off
            return type(error).__name__
    return said


def wait_until_ready(url: str, patience: float | None) -> None:
    """Return when the server is ready. Raises ChatError after ``patience`` seconds; None: sooner if there is none."""
    began, told = time.monotonic(), -10.0
    while (said := readiness(url)) != "ready":
        waited = time.monotonic() - began
        if said == "absent" and waited >= (NOBODY if patience is None else patience):
            raise ChatError(
                f"there is no server at {url} after {waited:.0f} seconds: start one with python nim_lora/serve.py, or "
                "give its --url. If docker is still downloading the container, wait longer with --wait"
            )
        if said == "HTTP 404":
            raise ChatError(f"{url} answers, but has none of {', '.join(HEALTH)}: it is another server. Give --url")
        if waited >= (PATIENCE if patience is None else patience):
            raise ChatError(
                f"the server at {url} is still loading after {waited:.0f} seconds (it says: {said}). A first start "
                "downloads the model and can take half an hour: look at its output, and wait longer with --wait"
            )
        if waited - told >= 10:
            told = waited
            state = "nobody listens yet" if said == "absent" else f"it is loading ({said})"
            print(f"waiting for {url}: {state}, {waited:.0f} s", file=sys.stderr, flush=True)
        time.sleep(0.5)


def choose(client: OpenAI, wanted: str | None) -> str:
    """The model to ask: the one that is wanted, the only adapter, or the only model. Raises ChatError otherwise."""
    models = list(client.models.list())
    names = [model.id for model in models]
    if wanted in names:
        return wanted
    adapters = [model.id for model in models if getattr(model, "parent", None)]
    for candidates in ([] if wanted else adapters, [] if wanted else names):
        if len(candidates) == 1:
            return candidates[0]
    problem = f"there is no model {wanted!r}" if wanted else "there are several models"
    raise ChatError(
        f"{problem} at {client.base_url}: choose one of {', '.join(names) or 'none'} with --model. NIM lists a new "
        "adapter when it looks again (NIM_PEFT_REFRESH_INTERVAL), and none that it cannot load: see its output"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Ask a fine-tuned model.")
    parser.add_argument("question", nargs="?", help="what you want to know")
    parser.add_argument("--model", help="name of an adapter or a model; by default the only one")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="of the server")
    parser.add_argument("--wait", type=float, metavar="SECONDS",
                        help=f"by default {PATIENCE} for a server that is loading, {NOBODY} for none")  # fmt: skip
    parser.add_argument("--max-tokens", type=int, default=60, help="length of the answer")
    parser.add_argument("--list", action="store_true", help="list the models and adapters")
    options = parser.parse_args()
    if not options.question and not options.list:
        parser.error("ask a question, or say --list")
    url = options.url.rstrip("/").removesuffix("/v1")
    if not url.startswith(("http://", "https://")):
        parser.error(f"--url is {options.url!r}: it begins with http:// or https://")
    try:
        client = client_for(url)
        wait_until_ready(url, options.wait)
        if options.list:
            for model in client.models.list():
                parent = getattr(model, "parent", None)
                print(model.id + (f"  (adapter of {parent})" if parent else ""))
            return
        answer = client.chat.completions.create(
            model=choose(client, options.model), messages=[{"role": "user", "content": options.question}],
            max_tokens=options.max_tokens, temperature=0,
        )  # fmt: skip
        print(answer.choices[0].message.content)
    except ChatError as error:
        sys.exit(f"error: {error}")
    except APIConnectionError as error:
        sys.exit(f"error: the connection to {url} broke: {error.__cause__ or error}. See the output of the server")
    except APIStatusError as error:
        sys.exit(f"error: {url} answered HTTP {error.status_code}: {error.message}")


if __name__ == "__main__":
    main()

"""From what the user calls a model (`tiny`, a folder, a Hub id) to a folder on this machine."""

from __future__ import annotations

import os
import socket
import threading
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from nanoflow_jax.config import EMBEDDED
from nanoflow_jax.weights.source import WeightsError, one_line

# What a model folder consists of; `original/`, PyTorch files and other frameworks' weights stay on the Hub.
_WANTED = ["*.json", "model*.safetensors", "tokenizer*", "*.model", "*.jinja", "merges.txt", "LICENSE*", "USE_POLICY*"]
_UNWANTED = ["*/*", "*.bin.index.json"]
_OF_TOKENIZER = ["tokenizer*", "special_tokens_map.json", "added_tokens.json", "*.jinja", "chat_template.json"]

_ACCEPTED = f"accepted: {', '.join(map(repr, EMBEDDED))}, a local folder, or a Hub id such as 'owner/name'"


def resolve_tokenizer(name: str) -> Path:
    """The same of a tokenizer that is not the model's own; of a Hub id its files alone are downloaded, all at once:
    `transformers` would try each of them again and again where the Hub cannot be reached."""
    return resolve_model(name, kind="tokenizer")


def resolve_model(model: str, revision: str | None = None, kind: str = "model") -> Path:
    """The local folder of a model, downloaded first if it is a Hub id; `revision` is a branch, tag or commit there.
    kind "tokenizer": of its tokenizer, which is then all that is downloaded.

    Raises WeightsError when the name is neither a folder nor a Hub id, or when the Hub does not give it.
    """
    local = EMBEDDED.get(model, Path(model).expanduser())
    if model and local.is_dir():
        if revision is not None:
            raise WeightsError(
                f"revision: {revision!r} given with {model!r}, a local folder; it goes with a Hub id only"
            )
        return local
    if not model or local.exists() or model.startswith((".", "~", os.sep)) or model.count("/") > 1:
        raise WeightsError(f"{kind}: {model!r} is {'not a folder' if local.exists() else 'no folder'}; {_ACCEPTED}")
    return _download(model, revision, kind)


def _download(model: str, revision: str | None, kind: str) -> Path:
    import huggingface_hub  # here, because a local model does not need it
    from huggingface_hub import errors

    what = f"{kind}: {model!r}" + (f" at revision {revision!r}" if revision else "")
    try:
        return Path(
            huggingface_hub.snapshot_download(
                model,
                revision=revision,
                allow_patterns=_OF_TOKENIZER if kind == "tokenizer" else _WANTED,
                ignore_patterns=_UNWANTED,
            )
        )
    except errors.HFValidationError:
        raise WeightsError(f"{what} is neither a folder nor a Hub id; {_ACCEPTED}") from None
    except errors.GatedRepoError:
        raise WeightsError(
            f"{what} is gated on the Hub: accept its terms there and log in with `hf auth login`"
        ) from None
    except (errors.RevisionNotFoundError, errors.RevisionResolutionError):
        raise WeightsError(f"{what} is not on the Hub; accepted: a branch, tag or commit of that repository") from None
    except errors.RepositoryNotFoundError:
        raise WeightsError(
            f"{what} is no folder here and not on the Hub (or private: log in with `hf auth login`); {_ACCEPTED}"
        ) from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        raise WeightsError(
            f"{what} is not in the local cache and the Hub cannot be reached; download it first, or name a folder"
        ) from None
    except (errors.HTTPError, OSError) as error:  # pyright: ignore[reportPrivateImportUsage] - of httpx or httpx2
        raise WeightsError(f"{what} could not be downloaded: {one_line(error)}") from None


def go_offline_without_hub(seconds: float = 3.0) -> bool:
    """Where the Hub cannot be reached, turns on its clients' offline mode, so that libraries that ask it again and
    again, for a minute and more, take what is in the local cache or fail at once. Returns whether it did so; asks
    nothing where a proxy stands between, or where the user has set HF_HUB_OFFLINE. To be called before `datasets` and
    `transformers` are imported."""
    if "HF_HUB_OFFLINE" in os.environ or getproxies():
        return False
    from huggingface_hub import constants

    url = urlsplit(constants.ENDPOINT)
    port = url.port or (80 if url.scheme == "http" else 443)
    reached: list[bool] = []

    def reach() -> None:
        with suppress(OSError):
            socket.create_connection((url.hostname or "", port), seconds).close()
            reached.append(True)

    asking = threading.Thread(target=reach, daemon=True)  # a name's lookup has no time limit of its own
    asking.start()
    asking.join(seconds)
    if not reached:
        os.environ["HF_HUB_OFFLINE"] = "1"
        constants.HF_HUB_OFFLINE = True
    return not reached

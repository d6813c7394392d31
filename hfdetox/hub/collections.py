"""Collections of the Hub: lists of repositories that somebody keeps."""

import re

from huggingface_hub import HfApi, constants

from hfdetox.errors import UsageError
from hfdetox.hub.client import AccessError, ask

_SLUG = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


def check_collection(collection: str) -> str:
    """Find out before a push whether the user may add to a collection; nothing is changed.

    Args:
        collection: OWNER/TITLE-ID, or its address.

    Returns:
        OWNER/TITLE-ID.

    Raises:
        UsageError: it is neither. HubError: there is none, it is another's, token or network.
    """
    slug = collection.rpartition("/collections/")[2].strip("/")
    if not _SLUG.fullmatch(slug):
        raise UsageError(
            f"--collection {collection} names no collection: give OWNER/TITLE-ID, which its address ends in"
        )
    ask(lambda: HfApi().get_collection(slug), f"the collection {slug}")
    account = ask(lambda: HfApi().whoami(), f"the collection {slug}")
    names = {str(account.get("name")), *(str(org.get("name")) for org in account.get("orgs") or [])}
    if slug.partition("/")[0] not in names:
        raise AccessError(f"the collection {slug} is not one of {', '.join(sorted(names))}: choose one of your own")
    return slug


def add_to_collection(slug: str, repo_id: str) -> str:
    """Add a model to a collection, unless it is in it, and return the collection's page; raises HubError."""
    ask(lambda: HfApi().add_collection_item(slug, repo_id, "model", exists_ok=True),
        f"model {repo_id} in the collection {slug}")  # fmt: skip
    return f"{constants.ENDPOINT}/collections/{slug}"

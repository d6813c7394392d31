"""Collections of the Hub: lists of repositories that somebody keeps."""

from huggingface_hub import HfApi, constants

from hfdetox.hub.client import ask


def check_collection(slug: str) -> None:
    """Find out before a push whether a collection is there; raises HubError."""
    ask(lambda: HfApi().get_collection(slug), f"the collection {slug}")


def add_to_collection(slug: str, repo_id: str) -> str:
    """Add a model to a collection, unless it is in it, and return the collection's page; raises HubError."""
    ask(lambda: HfApi().add_collection_item(slug, repo_id, "model", exists_ok=True),
        f"model {repo_id} in the collection {slug}")  # fmt: skip
    return f"{constants.ENDPOINT}/collections/{slug}"

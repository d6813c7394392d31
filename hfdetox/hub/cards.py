"""What the Hub says of a card before it is pushed."""

from huggingface_hub import constants, get_session
from huggingface_hub.errors import BadRequestError
from huggingface_hub.utils import hf_raise_for_status

from hfdetox.errors import UsageError
from hfdetox.hub.client import ask, line_of
from hfdetox.hub.download import RepoType


def check_card(text: str, repo_type: RepoType = "model") -> None:
    """Ask the Hub whether it would take a card (README.md); raises UsageError with its objection, or HubError."""

    def ask_hub() -> None:
        # not ModelCard.validate: in huggingface_hub 1.x that asks huggingface.co, whatever HF_ENDPOINT names
        body = {"repoType": repo_type, "content": text}
        try:
            hf_raise_for_status(get_session().post(f"{constants.ENDPOINT}/api/validate-yaml", json=body))
        except BadRequestError as error:
            reason = line_of(error.server_message or str(error))
            if repo_type == "dataset":
                raise UsageError(
                    f"the Hub refuses the dataset card: {reason}; report this as a bug of hfdetox"
                ) from error
            raise UsageError(f"the Hub refuses the model card: {reason}; take out of the source model's card what is "
                             "wrong in it, in a copy of the model's folder") from error  # fmt: skip

    ask(ask_hub, f"the {repo_type} card")

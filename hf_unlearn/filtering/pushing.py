"""How a filter, and a pipeline with a filter around it, come to the Hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from ..hub.origin import check_is_not_original_repository
from ..hub.publish import publish_folder


if TYPE_CHECKING:
    from huggingface_hub import CommitInfo


class FilterPushMixin:
    """A push by the allow-list. Who uses it has `save_pretrained`, and says what it is made from, and its card."""

    _commit_message: str

    def _made_from(self) -> list[str | None]:
        raise NotImplementedError

    def _card(self, repo_id: str, **metadata: Any) -> str:
        raise NotImplementedError

    def push_to_hub(
        self,
        repo_id: str,
        *,
        token: str | bool | None = None,
        revision: str | None = None,
        private: bool | None = None,
        commit_message: str | None = None,
        create_pr: bool = False,
        max_shard_size: int | str | None = None,
        license: str | None = None,
        language: str | Sequence[str] | None = None,
        tags: str | Sequence[str] = (),
        datasets: str | Sequence[str] | None = None,
        card: str | None = None,
    ) -> CommitInfo:
        """Publish it, and nothing else: see [`~hf_unlearn.hub.publish.publish_folder`].

        Args:
            repo_id, token, revision, private, commit_message, create_pr: see there.
            max_shard_size (`int` or `str`, *optional*): of a file of weights.
            license, language, tags, datasets (*optional*): for the card. Default: what the card says of what it is made from.
            card (`str`, *optional*): README.md instead of [`~hf_unlearn.filtering.card.filter_card`].

        Raises:
            ValueError: the repository is that of what it is made from, or see [`~hf_unlearn.hub.publish.check_publishable`].
        """
        metadata = {"license": license, "language": language, "tags": tags, "datasets": datasets}
        if card is not None and (given := [name for name, value in metadata.items() if value]):
            raise ValueError(f"{given[0]}: given beside card, which has its own; keep one of them")
        originals = self._made_from()
        check_is_not_original_repository(repo_id, originals)
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder, max_shard_size=max_shard_size)
            text = self._card(repo_id, token=token, **metadata) if card is None else card
            Path(folder, "README.md").write_text(text, encoding="utf-8")
            return publish_folder(
                folder,
                repo_id,
                token=token,
                revision=revision,
                private=private,
                commit_message=commit_message or self._commit_message,
                create_pr=create_pr,
                originals=originals,
            )

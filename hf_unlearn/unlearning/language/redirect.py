r"""Redirect: what the original would have said had the subject been somebody it never met.

For a forget text with prompt x and answer y, x̃ is the prompt with its subject replaced by a word that is made up, and the loss is
$\sum_t \mathrm{KL}\big(p^*(\cdot\,|\,\tilde x, \tilde y_{<t}) \,\|\, p(\cdot\,|\,x, y_{<t})\big)$ over the tokens of the answer, p\* the frozen original: zero
where the model speaks of the subject as the original does of strangers. Where the answer names the subject, p\* is what is said of the stranger's
name there, with the two exchanged. The same is asked of other questions about the subject: those that the forget texts ask of anybody, with
answers that the original writes about the stranger. What is to be kept are retain rows, and what the original writes by itself.

Built on: Who's Harry Potter (Eldan and Russinovich, arXiv 2310.02238) replaces names and takes the model's words about others as labels;
AltPO (arXiv 2409.13474) answers with plausible alternatives; UNDIAL (arXiv 2402.10052) distils a changed original; DELETE (arXiv 2503.23751)
takes the frozen original's distribution without the forgotten class; Magpie (arXiv 2406.08464) has aligned models write their own instructions.
"""

from __future__ import annotations

import logging
import math
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ...training.collators import ROW, WithRow
from ...training.losses import IGNORED, mean_of_counted
from .asked import Asked, ask, kept_rows, prompt_of
from .checks import check_begins, check_keep, check_marks, check_unused, tell_about, tell_targets
from .likeness import said_again
from .own_samples import can_begin, own_texts
from .strangers import choose_strangers, further_questions, of_forget_rows
from .subject import Subjects, Words
from .targets import divergence_from


logger = logging.getLogger(__name__)

CREDIT = {
    "names replaced by others, as in Who's Harry Potter": "2310.02238",
    "its own texts, as Magpie draws them": "2406.08464",
}
TOLERANCE = 0.02  # of probability and of the share that is known, above which the model still remembers
EPOCHS, FEWEST = 12, 3  # where num_train_epochs is not given: so many, but no more than brings the steps to
STEPS = 120, 400  # the larger one, nor fewer than brings them to the smaller one, and FEWEST at least
LOOKS = 10  # of the guard, where guard_steps is not given
LONGEST = 256  # tokens at most of what is written
OWN_SAMPLES, BESIDE = 4000, 1000  # texts of its own where own_samples is not given: alone, and beside rows to keep


class of_redirect:
    """A method or a property of the trainer whose forget loss is redirect; of one with another loss it is as without [`RedirectMixin`]."""

    def __init__(self, member: Any):
        self.member = member

    def __set_name__(self, owner: type, name: str) -> None:
        self.owner, self.name = owner, name

    def __get__(self, trainer: Any, kind: type | None = None) -> Any:
        if trainer is None:
            return self
        if not trainer.redirects:
            return getattr(super(self.owner, trainer), self.name)
        return self.member.__get__(trainer, kind)


class RedirectMixin:
    """Gives an unlearning trainer of texts the objective. What is marked [`of_redirect`] holds where that is the forget loss."""

    asked: Asked | None = None
    kept: Asked | None = None
    subjects: Subjects | None = None
    _chooses_epochs = False  # where none are given

    @property
    def redirects(self) -> bool:
        return self.forget_loss_name == "redirect"

    @of_redirect
    def _train(self, checkpoint: str | None, **kwargs):
        if checkpoint or self.asked is None:
            files = {name: self.private_dir / f"{name}.safetensors" for name in ("asked", "kept")}
            if not checkpoint and self.args.should_save:
                for name, asked in self._made().items():
                    asked.save(files[name])
            self.accelerator.wait_for_everyone()
            for name, file in files.items():
                if not file.is_file():
                    raise ValueError(f"resume_from_checkpoint: {file} is missing; start again")
                setattr(self, name, Asked.load(file))
        if self._chooses_epochs:
            self.args.num_train_epochs = self._epochs
        return super()._train(checkpoint, **kwargs)

    @of_redirect
    @property
    def _steps_look_back(self) -> bool:
        return False  # what the original says is known

    @property
    def _epochs(self) -> int:
        args = self.args
        rows = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        steps = math.ceil(len(self.asked.rows) / rows)
        least, most = STEPS
        return max(FEWEST, math.ceil(min(most, max(least, EPOCHS * steps)) / steps))

    def _made(self) -> dict[str, Asked]:
        """What is asked of the model, and what it is to keep; by the original, before the first step."""
        model, tokenizer, seed = self.model, self._tokenizer, self.args.seed
        rows, kept = self.forget_dataset, self.retain_dataset
        prompts = [prompt_of(ids, labels) for ids, labels in zip(rows["input_ids"], rows["labels"], strict=True)]
        keep = [] if kept is None else kept_rows(zip(kept["input_ids"], kept["labels"], strict=True))
        texts = own_texts(
            model, tokenizer, self._own_samples, chat=self._is_chat, max_new_tokens=self._longest, seed=seed,
            progress=not self.args.disable_tqdm,
        )  # fmt: skip
        limit = self.args.max_length  # which a question that was read again may be longer than
        texts = [(ids[:limit], begin, answer) for ids, begin, answer in texts if limit is None or answer < limit]
        own = kept_rows((ids, [IGNORED] * begin + ids[begin:]) for ids, begin, _ in texts)
        self.subjects = subjects = Subjects(self._words, prompts, [pair.ids for pair in (*keep, *own)], self._marked)
        if without := sum(not subject for subject in subjects.of):
            logger.warning(
                "forget_dataset: no subject found in %d of %d rows; their own tokens are taken away instead. Name it in a column "
                "'subject'", without, len(subjects.of),
            )  # fmt: skip
        if about := [row for row, pair in enumerate(keep) if subjects.named_in(pair.ids)]:
            tell_about(about, len(keep))
        if texts:
            forget = [(ids, len(prompt)) for ids, prompt in zip(rows["input_ids"], prompts, strict=True)]
            again = said_again(model, forget, subjects, [(ids, answer) for ids, _, answer in texts])
            logger.info("own samples: %d, %d that say what is to be forgotten left out", len(own), sum(again))
            keep += [pair for pair, left_out in zip(own, again, strict=True) if not left_out]
        check_keep(len(own), len(keep))
        choose_strangers(model, rows, subjects, seed=seed)
        pairs = of_forget_rows(rows, subjects)
        pairs += further_questions(rows, subjects, model, tokenizer, max_new_tokens=self._longest, seed=seed)
        made = {"asked": ask(model, pairs), "kept": ask(model, keep)}
        for name, part in made.items():
            tell_targets(name, part.targets, len(tokenizer))
        return made

    @property
    def _own_samples(self) -> int:
        """How many texts the original writes; where nothing is said, none beside rows to keep if it has nothing to begin with."""
        if self.args.own_samples is not None:
            return self.args.own_samples
        if self.retain_dataset is None:
            return OWN_SAMPLES
        return BESIDE if self._is_chat or can_begin(self._tokenizer) else 0

    @property
    def _longest(self) -> int:
        """Tokens at most of a question or an answer that the original writes: both have room in what the model, and the user, read at once."""
        read = getattr(self.model.config.get_text_config(), "max_position_embeddings", None), self.args.max_length
        room = min(filter(None, read), default=2 * LONGEST)
        return max(1, min(LONGEST, room // 2 - 1))

    @property
    def _is_chat(self) -> bool:
        """Whether the forget rows are conversations."""
        row = self.forget_dataset[0]
        return any(isinstance(row.get(name), list) for name in ("prompt", "messages", "conversations"))

    @cached_property
    def _words(self) -> Words:
        return Words(self._tokenizer)

    @property
    def _marked(self) -> list[str | None] | None:
        """What the user says each forget text is about."""
        return self.forget_dataset["subject"][:] if "subject" in self.forget_dataset.column_names else None

    def _settle_forget_loss(self) -> None:
        super()._settle_forget_loss()
        if self.redirects:
            self._check()

    def _check(self) -> None:
        args, rows = self.args, self.forget_dataset.with_format(None)
        check_unused(
            args.forget_loss,
            replay_weight=args.replay_weight,
            heldout_loss=args.heldout_loss,
            heldout_dataset=self.heldout_dataset,
        )
        if self.retain_dataset is None and not self._own_samples:
            raise ValueError("own_samples=0: leaves nothing to keep; leave it out, or pass retain_dataset=")
        check_begins(self._own_samples, self.retain_dataset is None, self._is_chat, self._tokenizer)
        marks = {row: mark for row, mark in enumerate(self._marked or ()) if mark}
        prompts = {row: prompt_of(rows[row]["input_ids"], rows[row]["labels"]) for row in marks}
        check_marks(marks, prompts, self._words)

    @of_redirect
    @property
    def _is_over(self) -> bool:
        nothing = self.guard and self.guard.looks and self.guard.looks[0].forgotten
        return super()._is_over or bool(nothing)

    # What the guard watches, and what is said in the end

    @of_redirect
    @property
    def nothing_to_forget(self) -> str:
        return (
            "the original knows the forget texts no better than if they were about somebody whom it never met "
            f"({100 * self.others['known']:.1f} % word for word, probability {self.others['probability']:.3g})"
        )

    @of_redirect
    @property
    def _title(self) -> str:
        return "redirect to what the original says of strangers"

    @of_redirect
    @property
    def _stands_on(self) -> dict[str, str]:
        return CREDIT

    @of_redirect
    @property
    def latest_is_best(self) -> bool:
        return True

    @of_redirect
    @property
    def guard_steps(self) -> int:
        return self.args.guard_steps or max(1, self.state.max_steps // LOOKS)

    @of_redirect
    def forget_figures(self, model) -> dict[str, float]:
        probability = self.mean_of(lambda batch: (-self.task_loss(model, batch)).exp(), self.forget_dataset)
        return super().forget_figures(model) | {"probability": probability}

    @of_redirect
    def remembered(self) -> float:
        return self.above_target(**self.forget_figures(self.model))

    @of_redirect
    def above_target(self, known: float = math.nan, probability: float = math.nan, **others: float) -> float:
        """How much more of the forget texts is known than where they are about somebody else: the larger excess, of their probability or of
        the share that is known word for word, less a tolerance.
        """
        return max(known - self.others["known"], probability - self.others["probability"]) - TOLERANCE

    @of_redirect
    @property
    def _target(self) -> str:
        return "the forget texts are no better known than where they are about somebody else"

    @of_redirect
    @property
    def _target_unit(self) -> str:
        return "of probability, or of the share known word for word,"

    @of_redirect
    def _forgotten_how_far(self, outcome) -> str:
        said = super()._forgotten_how_far(outcome)
        now, before = outcome.now["probability"], outcome.original["probability"]
        others = self.others
        return (
            f"{said}, their probability {now:.3g} ({before:.3g} before); about somebody else {100 * others['known']:.1f} % would be, with "
            f"probability {others['probability']:.3g}"
        )

    @of_redirect
    @property
    def _figure_names(self):
        return super()._figure_names | {"probability": ("probability", "Probability of the forget answers", "", 1)}

    @cached_property
    def others(self) -> dict[str, float]:
        """What the original knows of the forget texts where they are about somebody else: `known`, `probability`."""
        targets, labels = self.asked.targets, self.asked.rows["labels"][: len(self.forget_dataset)]
        known, probability = [], []
        for row, answer in enumerate(labels):
            answer, places = torch.tensor([label for label in answer[1:] if label != IGNORED]), targets.places([row])
            known.append(bool((targets.tokens[places, 0] == answer).all()))
            probability.append(targets.answer_log_p[places].mean().exp().item())
        return {"known": sum(known) / len(known), "probability": sum(probability) / len(probability)}

    @of_redirect
    def utility(self, model=None) -> float:
        """As without redirect, but that what is to be kept where there are no data is what the original wrote."""
        if self.utility_kind != "divergence":
            return super().utility(model)
        return self.mean_of(lambda batch: self._kl(model or self.model, batch, self.kept), WithRow(self.kept.rows))

    @of_redirect
    @property
    def has_utility(self) -> bool:
        return True

    @of_redirect
    @property
    def replay_weight(self) -> float:
        return 0.0

    @of_redirect
    def _chosen(self):
        added = {"own_samples": self._own_samples, "retain_per_forget": self.args.retain_per_forget}
        chosen = super()._chosen() | added
        return {name: value for name, value in chosen.items() if name not in ("retain_loss", "replay_weight")}

    # The loss

    @of_redirect
    @property
    def drawn_rows(self):
        return self.asked.rows

    @of_redirect
    def _training_rows(self):
        return WithRow(self.asked.rows), WithRow(self.kept.rows)

    @of_redirect
    def _forget_means(self, model, batch):
        return self._kl(model, batch, self.asked)

    @of_redirect
    def retain_loss(self, model, batch):
        return self.by_token(self._kl(model, batch, self.kept), batch)

    def _kl(self, model, batch, asked: Asked) -> Tensor:
        """Divergence from what is asked for, a mean over the tokens of each row, `[batch]`, nats."""
        logits, labels = self.counted(model, batch)
        targets = asked.targets.at(batch[ROW].tolist(), logits.device)
        return mean_of_counted(divergence_from(logits, *targets), labels)

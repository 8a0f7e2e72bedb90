"""`Extractor`: contrast pairs into steering vectors, through a function that sends requests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any

import numpy as np

from nblens.builder import RequestBuilder
from nblens.circumstances import Circumstances
from nblens.errors import Interrupted, UserError, shown, warn_caller
from nblens.layers import parse_layers
from nblens.model.answers import n_shared, opening_of
from nblens.model.chats import Chat, Conversation, turns_among
from nblens.model.continuation import continued
from nblens.model.prompts import FedPrompt, OnePrompt, as_prompts
from nblens.model.sites import check_site
from nblens.model.tokens import check_characters, check_ids, special_ids, tokenize
from nblens.progress import Send, progress_bar
from nblens.specs import ExtractionFinished, ExtractionSpec, Span, finished
from nblens.steering.estimators import METHODS
from nblens.steering.judging import best_block, interval
from nblens.steering.read_positions import (
    WITH_SPECIAL,
    Read,
    check_read,
    mean_positions,
    read_name,
    read_span,
    takes_special,
)
from nblens.steering.samples import Pair, Sample, as_pairs
from nblens.steering.steer import Steer
from nblens.steering.vector_store import check_name, check_op
from nblens.steering.vectors import SteeringVector

__all__ = ["Extractor"]

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Extractor:
    """Makes vectors on one model; Ctrl-C raises `Interrupted`."""

    build: RequestBuilder
    send: Send
    model: str
    """what a vector says it was made with"""
    origin: Circumstances = field(default_factory=Circumstances)
    """revision and dtype of the model"""

    def vector(
        self,
        name: str,
        pairs: Any,
        *,
        method: str,
        site: str,
        read: Read,
        layers: Any = None,
        write: Any = "all",
        op: str = "add",
        chat: Chat,
        progress: bool,
    ) -> SteeringVector:
        """The vector that contrast pairs make, and how it is written by default; see `Session.extract`."""
        check_name(name)
        usual = Steer(name, write=write, op=op)
        check_op(name, site, op)
        n_blocks = self.build.facts.n_blocks
        blocks = None if layers is None else parse_layers(layers, n_blocks)
        spec = self._spec(pairs, method=method, site=site, read=read, chat=chat)
        event = self._extract(spec, f"vector {name}", progress)
        written = blocks or (best_block(event.separation, event.separation_error),)
        judged = list(enumerate(zip(event.separation.tolist(), event.separation_error.tolist(), strict=True)))
        judged = judged if event.n_judges else []
        self._warn_of_carried_means(spec, event, written, read_name(read))
        _warn_of_first_tokens(spec, read_name(read))
        return SteeringVector(
            name=name,
            directions=dict(enumerate(event.directions)),
            site=site,
            layers=written,
            write=usual.write or "all",
            op=usual.op or "add",
            model=self.model,
            n_blocks=n_blocks,
            method=method,
            read=read_name(read),
            n_pairs=len(spec.positive),
            separation={block: distance for block, (distance, _) in judged},
            separation_interval={block: interval(*own, event.n_judges) for block, own in judged},
            data_hash=event.data_hash,
            activation_norms={block: float(norm) for block, norm in enumerate(event.activation_norms)},
        )

    def shuffled(
        self, vector: SteeringVector, pairs: Any, n_shuffles: int, *, chat: Chat, seed: int, progress: bool
    ) -> list[dict[int, np.ndarray]]:
        """Directions by written block, made as a vector was, but of pairs whose sides are swapped at random.

        A vector that has another length than these pairs give, as a normalised one has, gives them the same factor.
        """
        if not vector.method:
            raise UserError(
                f"steering vector {vector.name!r} was not extracted, so that nothing can be made like it of shuffled "
                "labels; leave pairs out"
            )
        read = int(vector.read) if vector.read.lstrip("-").isdecimal() else vector.read
        spec = self._spec(
            pairs,
            method=vector.method,
            site=vector.site,
            read=read,
            chat=chat,
            blocks=vector.layers,
            n_shuffles=n_shuffles,
            seed=seed,
        )
        event = self._extract(spec, "shuffled labels", progress)
        own = np.linalg.norm(event.directions, axis=-1, keepdims=True)
        lengths = np.array([[vector.norms[block]] for block in vector.layers])
        scaled = (event.shuffled * (lengths / np.maximum(own, np.finfo(np.float32).tiny))).astype(np.float32)
        return [dict(zip(vector.layers, directions, strict=True)) for directions in scaled]

    def _extract(self, spec: ExtractionSpec, title: str, progress: bool) -> ExtractionFinished:
        with progress_bar(title, shown=progress) as watch:
            events, interrupted = self.send(spec, watch)
        event = finished(events)
        assert isinstance(event, ExtractionFinished)
        if interrupted or event.cancelled:
            raise Interrupted("extraction was stopped; no vector was made")
        return event

    def _spec(
        self,
        pairs: Any,
        *,
        method: str,
        site: str,
        read: Read,
        chat: Chat,
        blocks: Sequence[int] = (),
        n_shuffles: int = 0,
        seed: int = 0,
    ) -> ExtractionSpec:
        """Contrast pairs as token ids, with the places where each is read."""
        if method not in METHODS:
            raise UserError(f"extraction method {shown(method)} is unknown; one of {', '.join(METHODS)}")
        for what, number in (("n_shuffles", n_shuffles), ("seed", seed)):
            if not isinstance(number, Integral) or number < 0:
                raise UserError(f"{what} must be a whole number, 0 or more; got {shown(number)}")
        check_read(read)
        left_out = None if takes_special(read) else special_ids(self.build.tokenizer)
        read_pairs = [self._pair(number, pair, read, chat, left_out) for number, pair in enumerate(as_pairs(pairs), 1)]
        (positive, negative), (positive_spans, negative_spans) = (
            tuple(zip(*column, strict=True)) for column in zip(*read_pairs, strict=True)
        )
        return ExtractionSpec(
            positive,
            negative,
            positive_spans,
            negative_spans,
            left_out=None if left_out is None else tuple(sorted(left_out)),
            site=check_site(site),
            method=method,
            blocks=tuple(blocks),
            n_shuffles=int(n_shuffles),
            seed=int(seed),
        )

    def _warn_of_carried_means(
        self, spec: ExtractionSpec, event: ExtractionFinished, blocks: Sequence[int], read: str
    ) -> None:
        """Tell of means, at blocks that are written, that are those of one token."""
        count, token_id, block = max((*event.carried[block], block) for block in blocks)
        if count:
            token = self.build.tokenizer.convert_ids_to_tokens(token_id)
            warn_caller(
                f"read at {read}, one token carries more than half of the mean's norm in {count} of "
                f"{2 * len(spec.positive)} texts at block {block}, most often {shown(token)}: the vector is more that "
                "token's than the texts'; read elsewhere, or at read='last'"
            )

    def _pair(
        self, number: int, pair: Pair, read: Read, chat: Chat, left_out: frozenset[int] | None
    ) -> tuple[tuple[Ids, ...], tuple[Span, ...]]:
        """Token ids of both sides, and what is read of them."""
        try:
            sides, labels = self._sides(pair, label=read == "label", chat=chat)
            ids = tuple(side.ids for side in sides)
            spans = tuple(
                read_span(read, len(side.ids), label, side.turns) for side, label in zip(sides, labels, strict=True)
            )
            for one, span in zip(ids, spans, strict=True):
                if not mean_positions(one, span, left_out):
                    raise UserError(
                        f"the mean leaves out special tokens and a text's first, and at {read_name(read)} one of the "
                        f"texts, of {len(one)} tokens, has no other; give read='{read_name(read)}{WITH_SPECIAL}' to "
                        "take them in, or longer texts"
                    )
        except UserError as error:
            raise UserError(f"pair {number}: {error}") from error
        return ids, spans

    def _sides(self, pair: Pair, *, label: bool, chat: Chat) -> tuple[tuple[FedPrompt, ...], Sequence[int | None]]:
        """Both sides as they are fed; where it is asked for, the position of each one's label."""
        prompt, *answers = (pair.prompt, pair.positive, pair.negative) if isinstance(pair, Sample) else ("", *pair)
        if label and all(isinstance(answer, str) for answer in answers):
            if chat and not prompt:
                raise UserError("under chat, a label is read in an answer; give Sample(prompt, positive, negative)")
            both = self.build.answered(prompt, answers, chat=chat)
            return tuple(FedPrompt(ids, both.turns) for ids in both.ids), both.labels
        if prompt:
            sides = tuple(self._side(prompt, answer, chat=chat) for answer in answers)
        else:
            sides = tuple(self.build.fed(_one_side(answer), chat=chat) for answer in answers)
        ids = [side.ids for side in sides]
        shared = n_shared(ids)
        if label and shared >= min(map(len, ids)):
            raise UserError("one side is the beginning of the other, or the same; where they part is unknown")
        return sides, (shared, shared) if label else (None, None)

    def _side(self, prompt: str | Conversation, answer: str, *, chat: Chat) -> FedPrompt:
        """A prompt, in its chat template or as it is, directly followed by an answer."""
        if isinstance(prompt, str) and chat is False:
            return self.build.fed(prompt + continued(answer, prompt), chat=False)
        check_characters("an answer", answer)
        tokenizer, room = self.build.tokenizer, self.build.context
        opening = opening_of(tokenizer, prompt, chat)
        whole = tokenize(tokenizer, opening.text + continued(answer, opening.text), special=False, most=room)
        check_ids(whole.ids, self.build.facts.vocab_size, room, tokenizer, whole=whole.whole)
        return FedPrompt(whole.ids, turns_among(whole, opening.spans))


def _warn_of_first_tokens(spec: ExtractionSpec, read: str) -> None:
    """Tell of texts that are read at their first token alone, as one word is without a beginning put before it."""
    spans = (*spec.positive_spans, *spec.negative_spans)
    if count := spans.count((0, 1)):
        warn_caller(
            f"read at {read}, {count} of {len(spans)} texts are read at their first token, where attention rests: its "
            "activation can be a hundred times as long as any other, and the vector is then that token's; put the "
            "same words before it, as nblens.Sample(prompt, positive, negative) or under chat"
        )


def _one_side(side: Any) -> OnePrompt:
    (first, *_), single = as_prompts(side) if len(side) else ([""], True)
    if not single:
        raise UserError(f"a side must be text, token ids or messages, got {shown(side)}")
    return first

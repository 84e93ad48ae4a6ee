"""The tasks of `evaluate`: left-to-right loss, infilling, needles; each gives figures with intervals.

Every task draws its samples from the validation documents with the seed alone, so two checkpoints answer the same
questions. Requests go through the engine greedily.
"""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from sparseray.actors.serving.text_request import GenerationRequest
from sparseray.actors.training.token_data import TokenDataset
from sparseray.errors import DataError
from sparseray.jobs.evaluation.intervals import Measured, ratio, share
from sparseray.jobs.evaluation.needle import DEPTHS, draw_needle
from sparseray.jobs.evaluation.subject import Subject
from sparseray.jobs.http.text_stream import Vocabulary

Tell = Callable[[str, int, int], None]
"""Told (task, samples done, samples in all)."""
Figures = dict[str, Measured]
LINE_TOKENS, SPAN_TOKENS = 48, 8
"""Most tokens that a line may be answered with, and tokens of a span."""
LEAST_LETTERS = 6
"""Characters that a line must have to be held out."""
MOST_SCORED = 200
"""Gaps whose own text is scored: a mean needs fewer than a share."""


@dataclass(frozen=True, kw_only=True)
class Gap:
    """A text that was held out of a document, and what stands around it, as ids."""

    before: tuple[int, ...]
    held_out: str
    after: tuple[int, ...]
    is_line: bool

    def is_filled_by(self, answer: str) -> bool:
        """Whether an answer is the held-out text: a line to its end, a span with its first characters."""
        if self.is_line:
            return answer.split("\n")[0].rstrip() == self.held_out.rstrip()
        return answer.startswith(self.held_out)

    @property
    def most_tokens(self) -> int:
        return LINE_TOKENS if self.is_line else 2 * SPAN_TOKENS


def chosen_documents(data: TokenDataset, samples: int, seed: int) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Yield documents without their end, in an order that the seed gives; again from the first when all were seen.

    Args:
        data: validation split.
        samples: how many.
        seed: of the order.
    """
    order = list(range(data.num_documents))
    random.Random(seed).shuffle(order)
    for turn in range(samples):
        yield turn, tuple(data.document(order[turn % len(order)]))


def losses(subject: Subject, data: TokenDataset, samples: int, seed: int, tell: Tell) -> Figures:
    """Cross-entropy of the next token from the left to the right, and bits per byte, over whole documents.

    Args:
        subject: the model.
        data: validation split.
        samples: documents, each once at most.
        seed: chooses them.
        tell: of progress.
    """
    samples = min(samples, data.num_documents)
    requests, sizes = [], {}
    for turn, document in chosen_documents(data, samples, seed):
        # The end of the document before stands in front, as in training, and the own end is predicted too.
        tokens = (data.eos_id, *document, data.eos_id)[: subject.context]
        sizes[str(turn)] = sum(len(subject.vocabulary.text_bytes(token)) for token in tokens)
        requests.append(
            GenerationRequest(request_id=str(turn), prompt_tokens=tokens, max_tokens=0, prompt_logprobs=0)
        )
    nats, counts, sizes_in_turn = [], [], []
    for done, (name, events) in enumerate(subject.answers(requests), 1):
        found = [one.logprob for one in events[0].prompt_logprobs or () if one.logprob is not None]
        nats.append(-math.fsum(found))
        counts.append(float(len(found)))
        sizes_in_turn.append(float(max(1, sizes[name])))
        tell("loss", done, samples)
    bits = [value / math.log(2.0) for value in nats]
    return {
        "loss, nats per token": ratio(nats, counts, seed),
        "bits per byte": ratio(bits, sizes_in_turn, seed),
    }


def gaps(subject: Subject, data: TokenDataset, samples: int, seed: int) -> list[Gap]:
    """Choose a line and a span of as many documents.

    Args:
        subject: whose vocabulary it is.
        data: validation split.
        samples: of each kind.
        seed: chooses them.

    Raises:
        DataError: no document is long enough.
    """
    found: list[Gap] = []
    for turn, ids in chosen_documents(data, max(samples, data.num_documents), seed):
        if len(found) >= 2 * samples:
            break
        draw = random.Random(f"{seed}:{turn}")
        line, span = _line(subject, ids, draw), _span(subject, ids, draw)
        found += [gap for gap in (line, span) if gap is not None and line is not None and span is not None]
    if not found:
        raise DataError(
            f"no validation document of {data.folder} has a line of {LEAST_LETTERS} characters between two others; "
            "prepare longer texts"
        )
    return found


def _line(subject: Subject, ids: Sequence[int], draw: random.Random) -> Gap | None:
    """Hold out one of the lines between the first and the last."""
    lines = subject.vocabulary.token_text(ids).split("\n")
    inner = [i for i in range(1, len(lines) - 1) if len(lines[i].strip()) >= LEAST_LETTERS]
    encode = subject.vocabulary.encode
    fitting = [i for i in inner if len(encode(lines[i])) < LINE_TOKENS]
    if not fitting:
        return None
    at = draw.choice(fitting)
    before, after = "\n".join(lines[:at]) + "\n", "\n" + "\n".join(lines[at + 1 :])
    return Gap(before=encode(before), held_out=lines[at], after=encode(after), is_line=True)


def _span(subject: Subject, ids: Sequence[int], draw: random.Random) -> Gap | None:
    """Hold out some tokens between two others, of whole characters and not of space alone."""
    if len(ids) < 3 * SPAN_TOKENS:
        return None
    at = draw.randrange(SPAN_TOKENS, len(ids) - 2 * SPAN_TOKENS + 1)
    text = subject.vocabulary.token_text(ids[at : at + SPAN_TOKENS])
    if "\ufffd" in text or len(text.strip()) < LEAST_LETTERS:
        return None
    before, after = tuple(ids[:at]), tuple(ids[at + SPAN_TOKENS :])
    return Gap(before=before, held_out=text, after=after, is_line=False)


def infilling(subject: Subject, data: TokenDataset, samples: int, seed: int, tell: Tell) -> Figures:
    """Exact match of held-out lines and spans: with the text behind the gap, and from what is before it alone.

    Args:
        subject: the model; without sentinels only the second is asked.
        data: validation split.
        samples: of each kind.
        seed: chooses them.
        tell: of progress.
    """
    chosen = gaps(subject, data, samples, seed)
    ways = ("infilling", "before alone") if subject.vocabulary.infilling else ("before alone",)
    requests, asked, ends = [], {}, line_ends(subject.vocabulary, data.vocab_size)
    for way in ways:
        for index, gap in enumerate(chosen):
            name = f"{way}/{index}"
            asked[name] = f"{way}, {'line' if gap.is_line else 'span'}", gap
            requests.append(_request(subject, name, gap, ends, way == "infilling"))
    hits: dict[str, list[bool]] = {}
    for done, (name, events) in enumerate(subject.answers(requests), 1):
        figure, gap = asked[name]
        hits.setdefault(figure, []).append(gap.is_filled_by(subject.text(events)))
        tell("infilling", done, len(requests))
    shares = {name: share(sum(found), len(found)) for name, found in sorted(hits.items(), reverse=True)}
    return shares | _likelihoods(subject, requests, asked, seed, tell)


def _likelihoods(
    subject: Subject,
    requests: Sequence[GenerationRequest],
    asked: dict[str, tuple[str, Gap]],
    seed: int,
    tell: Tell,
) -> Figures:
    """Nats per token of the held-out texts themselves: they tell models apart that fill no gap yet.

    Args:
        subject: the model.
        requests: that asked for the gaps.
        asked: figure and gap of each, by its id.
        seed: of the bootstrap.
        tell: of progress.
    """
    scored, sizes = [], {}
    for request in requests:
        if int(request.request_id.split("/")[1]) >= MOST_SCORED:
            continue
        wanted = subject.vocabulary.encode(asked[request.request_id][1].held_out)[: request.max_tokens]
        sizes[request.request_id] = len(wanted)
        prompt = (*request.prompt_tokens, *wanted)
        scored.append(replace(request, prompt_tokens=prompt, max_tokens=0, prompt_logprobs=0))
    found: dict[str, list[tuple[float, float]]] = {}
    for done, (name, events) in enumerate(subject.answers(scored), 1):
        last = (events[0].prompt_logprobs or ())[-sizes[name] :]
        nats = -math.fsum(one.logprob or 0.0 for one in last)
        found.setdefault(f"{asked[name][0]}, nats", []).append((nats, float(sizes[name])))
        tell("scoring", done, len(scored))
    return {
        name: ratio([one for one, _ in pairs], [size for _, size in pairs], seed)
        for name, pairs in sorted(found.items(), reverse=True)
    }


def line_ends(vocabulary: Vocabulary, size: int) -> tuple[int, ...]:
    """Tokens after which nothing more of an answer to a held-out line counts.

    Args:
        vocabulary: of the model.
        size: number of its ids.
    """
    return tuple(token for token in range(size) if b"\n" in vocabulary.text_bytes(token))


def _request(
    subject: Subject, name: str, gap: Gap, ends: Sequence[int], with_after: bool
) -> GenerationRequest:
    """Ask for a gap with as much around it as the context holds, on both sides alike.

    Args:
        subject: the model.
        name: of the request.
        gap: to fill.
        ends: of lines.
        with_after: tell what stands behind the gap too.
    """
    room = subject.context - gap.most_tokens - 3
    sentinels, eos = subject.vocabulary.infilling, subject.vocabulary.eos_id
    after = gap.after[: max(room // 2, room - len(gap.before))] if with_after else ()
    before = gap.before[max(0, len(gap.before) - (room - len(after))) :]
    if with_after:
        assert sentinels is not None
        prompt = sentinels.prompt(before, after)
    else:
        prompt = before or (eos,)
    return GenerationRequest(
        request_id=name,
        prompt_tokens=prompt,
        max_tokens=gap.most_tokens,
        temperature=0.0,
        stop_token_ids=(eos, *ends) if gap.is_line else (eos,),
    )


def needles(subject: Subject, data: TokenDataset, samples: int, seed: int, tell: Tell) -> Figures:
    """Retrieval of a number from texts that fill a quarter, a half and the whole of the context, all and by depth.

    Args:
        subject: the model.
        data: validation split, whose documents are the haystack.
        samples: for each length.
        seed: chooses needles and documents.
        tell: of progress.
    """
    encode, figures = subject.vocabulary.encode, {}
    lengths = [subject.context // part for part in (4, 2, 1)]
    for done, length in enumerate(lengths):
        requests, answers, depths = [], {}, {}
        for turn in range(samples):
            draw = random.Random(f"{seed}:{length}:{turn}")
            needle, depth = draw_needle(draw), DEPTHS[turn % len(DEPTHS)]
            sentence, question, wanted = (
                encode(text) for text in (needle.sentence, needle.question, needle.answer)
            )
            room = length - len(sentence) - len(question) - len(wanted)
            if room < 0:
                break
            hay = _hay(data, room, draw)
            at = round(depth * len(hay))
            answers[str(turn)], depths[str(turn)] = needle.answer, depth
            requests.append(
                GenerationRequest(
                    request_id=str(turn),
                    prompt_tokens=(*hay[:at], *sentence, *hay[at:], *question),
                    max_tokens=len(wanted),
                    temperature=0.0,
                )
            )
        hits: dict[float, list[bool]] = {}
        for count, (name, events) in enumerate(subject.answers(requests), 1):
            hits.setdefault(depths[name], []).append(subject.text(events).startswith(answers[name]))
            tell("needle", done * samples + count, len(lengths) * samples)
        if requests:
            figures[f"needle in {length} tokens"] = share(sum(map(sum, hits.values())), len(requests))
        for depth, found in sorted(hits.items()):
            figures[f"needle in {length} tokens, depth {depth:g}"] = share(sum(found), len(found))
    return figures


def _hay(data: TokenDataset, size: int, draw: random.Random) -> tuple[int, ...]:
    """Text of as many tokens, without ends of documents: their end would tell a model to forget."""
    found: list[int] = []
    while len(found) < size:
        found += data.document(draw.randrange(data.num_documents))
    return tuple(found[:size])


TASKS = {"loss": losses, "infilling": infilling, "needle": needles}

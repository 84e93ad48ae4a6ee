"""A slot: one process with a device share that plays whatever roles the plan gives it. This is its event loop.

Two threads: the control thread reads the mailbox, answers pings and announces plans (wire/slot_mailbox.py); the work
thread, here, runs steps and engine steps (roles.py) and answers its peers, also while it waits for them itself, so
two slots that need each other cannot block. A later plan ends what the work thread is in.
What belongs to a step that is not open yet waits until the commit before it has been applied.
"""

import threading
import time
import traceback
from collections import deque
from collections.abc import Callable

import torch

from sparseray.actors.exchange.answers import Answers
from sparseray.actors.installation import Gather, InstallPlan, JobSpec
from sparseray.actors.job import Job
from sparseray.actors.roles import Roles
from sparseray.actors.serving.messages import Cancel, Drain, Generate
from sparseray.actors.wire.envelope import SCHEDULER, Body, Message
from sparseray.actors.wire.messages import Commit, ExpertForward, Failed, FetchRows, Silent
from sparseray.actors.wire.slot_mailbox import SlotMailbox
from sparseray.errors import SlotLostError, SupersededError, UserError
from sparseray.log import get_logger

log = get_logger(__name__)

IDLE_S = 0.5
_UNORDERED = (InstallPlan, Gather, Generate, Cancel, Drain)
_OF_ANY_VERSION = (ExpertForward, FetchRows)


def is_device_lost() -> bool:
    """Whether this process can use its GPU no more, as after an illegal access: every call of the driver says so."""
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def device_full(error: torch.OutOfMemoryError, *, is_serving: bool) -> str:
    """What to do about a device without memory left, as a sentence for a user.

    Args:
        error: that said so.
        is_serving: whether a server's slot has met it.
    """
    cure = "lower serve.cache_gib, serve.max_batch or serve.max_model_len"
    if not is_serving:
        cure = "set train.recompute=true or optim.moments=bfloat16, or lower train.sequences_per_shard"
    said = " ".join(str(error).split())
    return f"its device has no memory left; {cure} (`python -m sparseray plan` tells what is taken). {said}"


def told(error: Exception, *, is_serving: bool) -> Failed:
    """What a slot says to the scheduler of what it could not do.

    Args:
        error: that ended it.
        is_serving: whether it is a server's slot.
    """
    if isinstance(error, torch.OutOfMemoryError):
        return Failed(error=device_full(error, is_serving=is_serving), user=True)
    text = f"{type(error).__name__}: {error}"
    return Failed(error=text, user=isinstance(error, UserError), lost=is_device_lost())


class Slot:
    """Serves one mailbox as long as its process lives, or its lease.

    Args:
        mailbox: own mailbox.
        job_from: returns the job that a plan message describes.
    """

    def __init__(self, mailbox: SlotMailbox, job_from: Callable[[JobSpec], Job]) -> None:
        self.mailbox = mailbox
        self.roles = Roles(
            mailbox, job_from, lambda message: self._handle(message, waiting=True), self._control
        )
        self.later: deque[Message[Body]] = deque()
        self.deferred: list[Message[Body]] = []

    def serve_forever(self) -> None:
        """Handle messages until the mailbox is stopped; a failure is told to the scheduler, and the slot goes on."""
        control = threading.Thread(
            target=self.mailbox.read, args=(self.roles.abort,), daemon=True, name="control"
        )
        control.start()
        try:
            while not self.mailbox.is_stopped:
                self._turn()
        finally:
            self.mailbox.close()
            control.join()

    def _turn(self) -> None:
        """Handle one message, or run one engine step."""
        message: Message[Body] | None = None
        what = "generating"
        try:
            self.roles.engine_role.tell_load()
            is_generating = self.roles.engine_role.has_work
            if self.later and not self.mailbox.is_superseded:
                message = self.later.popleft()
            else:
                message = self.mailbox.next(0.0 if is_generating else IDLE_S)
            if message is not None:
                what = message.body.kind
                self._handle(message, waiting=False)
            elif is_generating:
                self.roles.engine_role.step()
        except SupersededError:
            log.debug("slot %d: a later plan ended %s", self.mailbox.slot, what)
        except SlotLostError as error:
            log.warning("%s", error)
            self._tell(Silent(error=str(error)))
        except Exception as error:
            log.error("slot %d failed on %s:\n%s", self.mailbox.slot, what, traceback.format_exc())
            self._tell(told(error, is_serving=self.roles.is_serving))

    def _tell(self, body: Body) -> None:
        self.mailbox.post(SCHEDULER, body, step=self.roles.committed)

    def _handle(self, message: Message[Body], *, waiting: bool) -> None:
        """Handle one message; while a step of our own waits for replies, control messages keep."""
        roles, kind, slot = self.roles, type(message.body), self.mailbox.slot
        if message.reply_to:
            # Somebody else has answered meanwhile.
            roles.patience.heard(message.source)
        elif kind in _OF_ANY_VERSION and roles.plan is None:
            # An engine that has entered the generation already asks one that is entering it still.
            self.deferred.append(message)
        elif (earlier := roles.earlier) and message.step == earlier.number + 1 and kind in _OF_ANY_VERSION:
            self._answer(message, earlier.answers)
        elif kind not in _UNORDERED and message.step > roles.committed + 1:
            self.deferred.append(message)
        elif kind not in _UNORDERED and message.step < roles.committed + 1:
            log.debug("slot %d: %s of step %d comes again", slot, kind.kind, message.step)
        elif kind in roles.control:
            if waiting:
                self.later.append(message)
            else:
                self._control(message)
        elif roles.answers is not None and roles.answers.knows(kind):
            self._answer(message, roles.answers)
        elif roles.reduction is not None and kind in roles.reduction.handlers:
            roles.reduction.handlers[kind](message)
        else:
            log.warning("slot %d: unexpected message %r from slot %d", slot, kind.kind, message.source)

    def _answer(self, message: Message[Body], answers: Answers | None) -> None:
        assert answers is not None
        started = time.perf_counter()
        reply = answers(message.body, message.layer, message.part)
        self.roles.engine_role.answered(type(message.body), time.perf_counter() - started)
        self.mailbox.post(message.source, reply, step=message.step, reply_to=message.sequence)

    def _control(self, message: Message[Body]) -> None:
        """Do what the scheduler or the ingress asks, then serve what waited for it."""
        if isinstance(message.body, InstallPlan) and message.body.plan != self.roles.plan:
            # Requests are of no generation; whatever else waited was.
            self.later = deque(m for m in self.later if m.body.is_of_any_generation)
            self.deferred.clear()
        self.roles.control[type(message.body)](message)
        if isinstance(message.body, Commit | InstallPlan):
            waiting, self.deferred = self.deferred, []
            # What others wait for goes first: a step of our own would wait for them in turn.
            for deferred in sorted(waiting, key=lambda m: type(m.body) in self.roles.control):
                if type(deferred.body) in self.roles.control:
                    self.later.append(deferred)
                else:
                    self._handle(deferred, waiting=False)

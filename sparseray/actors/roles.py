"""The roles that a slot plays in one generation, and what each message of a step or a request makes it do.

Called by slot.py, in the work thread alone.
One step: RunStep -> (FetchRows, Expert*)* -> FinishPart, DenseNodes -> *Reduced -> Prepared -> Commit.
A change of plan: InstallPlan -> Pull* -> Installed; it may come at any moment and ends a step half way.
One request: Generate -> (FetchRows, ExpertForward)* -> Tokens, once for every engine step.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from sparseray.actors.engine_role import EngineRole
from sparseray.actors.exchange.answers import Answers
from sparseray.actors.exchange.by_message import Caller
from sparseray.actors.exchange.patience import Patience
from sparseray.actors.exchange.protocol import Exchange
from sparseray.actors.exchange.reduction import Reduction
from sparseray.actors.gathering import Gathering
from sparseray.actors.installation import Gather, Gathered, InstallPlan, JobSpec, pull_missing, restore
from sparseray.actors.job import Job
from sparseray.actors.observation import observe_worker
from sparseray.actors.peers.choice import exchange_of, is_in_step, lay_open
from sparseray.actors.peers.peers import Peers
from sparseray.actors.serving.messages import Retire, Stage, Staged
from sparseray.actors.serving.staging import Edition, Staging
from sparseray.actors.state.assignment import Plan
from sparseray.actors.state.holdings import Holdings
from sparseray.actors.state.slab_experts import SlabExperts
from sparseray.actors.training.background_save import BackgroundSave
from sparseray.actors.training.worker import AttentionWorker
from sparseray.actors.wire.envelope import INGRESS, SCHEDULER, Body, Message
from sparseray.actors.wire.messages import (
    Commit,
    Evaluate,
    Evaluated,
    Installed,
    Offer,
    Offered,
    PartDone,
    RunStep,
    SaveCheckpoint,
    Saved,
    SavedTensor,
    Settled,
    Stale,
    StillWriting,
    Withdraw,
)
from sparseray.actors.wire.slot_mailbox import SlotMailbox
from sparseray.errors import OfferGoneError
from sparseray.log import get_logger

log = get_logger(__name__)


class Roles:
    """Everything that one slot holds and does.

    Args:
        mailbox: of the slot.
        job_from: returns the job that a plan message describes.
        serve: handles messages that come while a request of our own waits for its replies.
        enter: enters a plan that comes within a step of the engine.
    """

    def __init__(
        self,
        mailbox: SlotMailbox,
        job_from: Callable[[JobSpec], Job],
        serve: Callable[[Message[Body]], None],
        enter: Callable[[Message[Body]], None],
    ) -> None:
        self.mailbox, self.job_from, self.serve = mailbox, job_from, serve
        self.committed, self.is_serving = 0, False
        self.plan: Plan | None = None
        self.holdings: Holdings | None = None
        self.answers: Answers | None = None
        self.reduction: Reduction | None = None
        self.exchange: Exchange | None = None
        self.worker: AttentionWorker | None = None
        self.saving, self.offering = BackgroundSave(), BackgroundSave(is_brief=True)
        self.is_new_plan = False
        self.staging, self.gathering = Staging[Holdings](), Gathering()
        self.earlier: Edition | None = None
        self.patience, self.peers = Patience(), Peers(mailbox.slot)
        self.engine_role = EngineRole(mailbox, enter, self.patience)
        self.control: dict[type[Body], Callable[[Message[Any]], None]] = {
            InstallPlan: self._install,
            RunStep: self._run_step,
            Commit: self._commit,
            Evaluate: self._evaluate,
            SaveCheckpoint: self._checkpoint,
            Offer: self._offer,
            Withdraw: self._withdraw,
            Settled: self._settled,
            Gather: self._gather,
            Stage: self._stage,
            Retire: self._retire,
            **self.engine_role.handlers,
        }

    def abort(self) -> None:
        """End what is computed at its next operation; called by the control thread."""
        exchange = self.exchange
        if exchange is not None:
            exchange.abort()

    # -- a change of plan ----------------------------------------------------------------------

    def _install(self, message: Message[InstallPlan]) -> None:
        """Enter a generation: finish or drop the open step, get what is lacking, take the roles."""
        body, plan, me = message.body, message.body.plan, self.mailbox.slot
        if plan.generation == self.mailbox.generation and self.plan == plan:
            self.mailbox.post(SCHEDULER, Installed(), step=self.committed)
            return
        ingress = {INGRESS: body.ingress} if body.ingress else {}
        self.mailbox.adopt(plan.generation)
        self.mailbox.transport.connect({**plan.addresses, SCHEDULER: body.scheduler, **ingress})
        self.worker, self.exchange, self.reduction, self.plan = None, None, None, None
        self.peers.leave()
        self.saving.forget()
        self.offering.forget()
        self.job = self.job_from(body.job)
        self.is_serving = self.job.is_serving
        if self.holdings is None:
            self.holdings = self.job.holdings()
        trains, mine = not self.job.is_serving, plan.pieces_of(me)
        self.patience.deadline_s = self.job.deadline_s
        if not trains:
            self._turn_to(body)
        self.answers = Answers(
            self.holdings, self.job.observe, with_optimizer=trains, introduce=self.peers.introduction
        )
        call = Caller(self.mailbox, self.answers, self.serve, self.job.deadline_s)
        if body.restore is not None and body.restore.everything:
            self.holdings.clear()
            self.committed = body.step
        elif not self._catch_up(body):
            self.engine_role.drop()
            self.mailbox.post(SCHEDULER, Stale(), step=self.committed)
            return
        if is_in_step(plan, self.holdings, me, trains=trains):
            call.step = self.committed + 1
            lay_open(self.peers, plan, self.holdings, self.job.part_shape, trains=trains)
            if trains and body.by_collectives:
                self.peers.meet(plan, call, self.holdings.experts.device)
        self.gathering.give(self.holdings, mine, body)
        if trains or body.source is None or not isinstance(self.holdings.experts, SlabExperts):
            # An engine that sent all its weights from a device would serve nobody meanwhile.
            pull_missing(self.holdings, mine, body, call, with_optimizer=trains)
        if body.source is not None:
            try:
                restore(self.holdings, mine, body, self.job.read, with_optimizer=trains)
            except OfferGoneError as error:
                log.warning("slot %d cannot read its weights: %s", me, error)
                self.holdings.clear()
                self.engine_role.drop()
                self.mailbox.post(SCHEDULER, Stale(), step=self.committed)
                return
        self._take_roles(plan, call)
        if body.restore is not None and body.restore.everything:
            # A start, which compiles next; who enters later waits for pinned memory only when it is back at work.
            self._reserve(plan)
        self._keep_earlier(plan)
        model = None if self.worker is None else self.worker.state.model
        self.engine_role.take(self.job, model, self.exchange, self.committed, self.earlier)
        self.plan = plan
        self.mailbox.post(SCHEDULER, Installed(), step=self.committed)

    def _settled(self, message: Message[Settled]) -> None:
        assert self.holdings is not None and self.answers is not None
        self.answers.giving.end()
        self.holdings.trim()

    def _gather(self, message: Message[Gather]) -> None:
        """Read what a plan that is to come gives this slot, in a thread."""
        body = message.body
        self.mailbox.transport.reach(SCHEDULER, body.scheduler)
        job = self.job_from(body.job)
        if self.holdings is None:
            self.holdings = job.holdings()

        def tell(error: str) -> None:
            self.mailbox.post(SCHEDULER, Gathered(pieces=body.pieces))

        self.gathering.start(body, self.holdings, job.read, tell)

    # -- versions of a server's weights ----------------------------------------------------------

    def _turn_to(self, body: InstallPlan) -> None:
        """Take the version of a plan: what was read of it goes in the place of the one that is here."""
        assert self.holdings is not None
        before = Edition(number=self.committed, holdings=self.holdings)
        is_fresh = body.restore is not None and body.restore.everything
        if self.holdings.held and body.step != self.committed and not is_fresh:
            self.holdings = self.staging.take((body.step, body.weights)) or self.job.holdings()
            self.committed, self.earlier = body.step, before
        if self.earlier is not None and (is_fresh or self.earlier.number != body.earlier):
            self.earlier = None

    def _keep_earlier(self, plan: Plan) -> None:
        """Go on answering for the version before, in this plan."""
        found, me = self.earlier, self.mailbox.slot
        if found is None:
            return
        found.holdings.assign(plan, me)
        found.answers = Answers(found.holdings, self.job.observe, with_optimizer=False)
        call = Caller(self.mailbox, found.answers, self.serve, self.job.deadline_s)
        found.exchange = None
        if plan.parts_of(me) and found.model is not None:
            found.exchange = self._exchange(plan, found.holdings, call)

    def _stage(self, message: Message[Stage]) -> None:
        """Read another version's pieces in a thread."""
        assert self.plan is not None
        body, job, mine = message.body, self.job, self.plan.pieces_of(self.mailbox.slot)

        def read() -> Holdings:
            found = job.holdings()
            tensors = job.read(body.checkpoint, found.names(mine, with_optimizer=False))
            found.load(mine, tensors, body.version, with_optimizer=False)
            return found

        def tell(error: str) -> None:
            self.mailbox.post(SCHEDULER, Staged(version=body.version, error=error))

        self.staging.start((body.version, body.checkpoint), read, tell)

    def _retire(self, message: Message[Retire]) -> None:
        if message.body.version == self.committed:
            self.engine_role.drop_earlier()
            if not message.body.engines_only:
                self.earlier = None

    def _catch_up(self, body: InstallPlan) -> bool:
        """Reach the plan's step: apply a commit that did not arrive. False when that cannot be done."""
        assert self.holdings is not None
        commit = body.commit
        if not self.holdings.held:
            self.committed = body.step
        elif (
            commit is not None and commit.step == body.step == self.committed + 1 and self.holdings.is_reduced
        ):
            self._apply(commit)
        if self.committed != body.step:
            log.warning("slot %d is at step %d, not %d", self.mailbox.slot, self.committed, body.step)
            self.holdings.clear()
            return False
        return True

    def _take_roles(self, plan: Plan, call: Caller) -> None:
        """Build what the plan has this slot do."""
        assert self.holdings is not None
        me, held, self.is_new_plan = self.mailbox.slot, self.holdings, True
        held.assign(plan, me)
        if self.is_serving and isinstance(held.experts, SlabExperts):
            # Nobody pulls from an engine's slabs, and rounds go by the rows that experts have in them from here on.
            held.trim()
        dense = held.dense if me in plan.dense else None
        # What lies in slabs is summed by the exchange itself.
        in_slabs = isinstance(held.experts, SlabExperts)
        summed = (None, None) if in_slabs else (dense, held.experts)
        self.reduction = Reduction(self.mailbox, plan, summed[0], summed[1], held.memory)
        call.step = self.committed + 1
        self.exchange = self._exchange(plan, held, call)
        if plan.parts_of(me):
            assert dense is not None and self.exchange is not None
            self.worker = AttentionWorker(dense, self.exchange)

    def _exchange(self, plan: Plan, held: Holdings, call: Caller) -> Exchange | None:
        """How this slot reaches experts and rows of what it holds."""
        assert self.reduction is not None
        return exchange_of(
            plan,
            held,
            call,
            self.reduction,
            peers=self.peers,
            part_shape=self.job.part_shape,
            observe=self.job.observe,
            patience=self.patience if self.job.is_serving else None,
            trains=not self.job.is_serving,
        )

    # -- training ------------------------------------------------------------------------------

    def _run_step(self, message: Message[RunStep]) -> None:
        assert self.plan is not None
        me, step = self.mailbox.slot, message.step
        if (saved := self.saving.take()) is not None:
            self.mailbox.post(SCHEDULER, saved[1], step=saved[0])
        if self.saving.is_busy:
            self.mailbox.post(SCHEDULER, StillWriting(), step=step)
        if self.exchange is None:  # It has rows alone, and is asked for them.
            return

        def report(part: int, done: PartDone) -> None:
            self.mailbox.post(SCHEDULER, done, step=step, part=part)

        self.exchange.expect(list(enumerate(self.plan.part_owners)), trains=True)
        if self.worker is None:
            self.exchange.accompany(step)
            return
        self.worker.run_step(step, self.plan.parts_of(me), self.job.train_batches(), report)
        observe_worker(self.job.observe, self.worker)

    def _commit(self, message: Message[Commit]) -> None:
        assert self.answers is not None
        self.answers.giving.end()
        self._apply(message.body)
        if self.is_new_plan and self.plan is not None:
            self._reserve(self.plan)

    def _reserve(self, plan: Plan) -> None:
        """Begin to take host memory for checkpoints of a plan, unless files of an earlier one need theirs still."""
        if self.job.saves_beside and not self.saving.is_busy:
            self.saving.reserve(self._files(plan))
            self.is_new_plan = False

    def _apply(self, commit: Commit) -> None:
        """Apply a step's update to every replica held here."""
        assert self.holdings is not None and commit.step == self.committed + 1
        self.saving.wait_until_copied()
        self.offering.wait_until_copied()
        rows = 0
        if commit.is_skipped:
            self.holdings.pass_over()
        else:
            rows = self.holdings.apply(
                lr=commit.lr, memory_lr=commit.memory_lr, scale=commit.scale, counts_LE=commit.counts_LE
            )
        self.committed = commit.step
        if rows:
            assert self.holdings.memory is not None
            self.job.observe("dse_update_rows_total", rows)
            self.job.observe("dse_table_bytes", self.holdings.memory.num_bytes)

    def _evaluate(self, message: Message[Evaluate]) -> None:
        assert self.exchange is not None
        self.exchange.expect(message.body.batches, trains=False)
        mine = [index for index, owner in message.body.batches if owner == self.mailbox.slot]
        found = {}
        if self.worker is not None:
            found = self.worker.evaluate(message.step, mine, self.job.validation_batches())
        self.exchange.accompany(message.step)
        self.mailbox.post(SCHEDULER, Evaluated(losses=found), step=message.step)

    def _checkpoint(self, message: Message[SaveCheckpoint]) -> None:
        """Write what is primary here into the checkpoint's folder and report the hashes, now or when that is done."""
        assert self.plan is not None
        files, write = self._files(self.plan), partial(self.job.write, message.body.directory)
        if message.body.in_background:
            assert self.holdings is not None
            self.saving.start(message.step, files, write, self.holdings.begin_copy())
            return
        self.saving.forget()
        entries = {name: entry for file, found in files.items() for name, entry in write(file, found).items()}
        self.mailbox.post(SCHEDULER, Saved(tensors=entries), step=message.step)

    def _files(self, plan: Plan) -> dict[str, dict[str, Tensor]]:
        """What is primary here, by the file of a checkpoint that it goes to.

        The generation keeps a slot that was given up and comes back from writing over another's file.
        """
        assert self.holdings is not None
        me = self.mailbox.slot
        return {
            f"{file}_{me}_{plan.generation}": self.holdings.tensors(of)
            for file, of in plan.primary_of(me).items()
            if of
        }

    # -- for servers that follow the run -------------------------------------------------------

    def _offer(self, message: Message[Offer]) -> None:
        """Copy the weights that are primary here beside the next step, and say where they can be read."""
        assert self.holdings is not None and self.plan is not None
        job, step = self.job, self.committed
        pieces = [piece for of in self.plan.primary_of(self.mailbox.slot).values() for piece in of]

        def keep(_: str, tensors: dict[str, Tensor]) -> dict[str, SavedTensor]:
            self.mailbox.post(SCHEDULER, Offered(step=step, address=job.offer(step, tensors)), step=step)
            return {}

        tensors = self.holdings.tensors(pieces, with_optimizer=False)
        self.offering.start(step, {"": tensors}, keep, self.holdings.begin_copy())

    def _withdraw(self, _: Message[Withdraw]) -> None:
        self.offering.forget()
        self.job.withdraw()

"""Requests of many clients on one thread: they join and leave the running batches of engines.

A request goes to the smallest bucket that holds it. Each bucket is an `Engine`, made when it is
first needed, so that short requests do not pay for the longest ones.
"""

import collections
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax

from icae_jax.errors import UserError
from icae_jax.inference.engine import Engine, padded
from icae_jax.inference.requests import Request, Running
from icae_jax.server.failures import ApiError, of_fault

SMALLEST, GROWTH = 128, 4  # tokens of the smallest bucket; of the next one, as many times as many
FULL_ROWS = 512  # up to so many tokens a bucket has all rows; longer ones have fewer
RETRY_SECONDS = 5  # after which a client may try again what did not fit into memory

MakeEngine = Callable[["Bucket"], Engine]
Call = Callable[[Callable[[], None]], object]


class Bucket(NamedTuple):
    """The shape of an engine.

    tokens: of a prompt with its answer. memory_tokens: of a memory with its head. rows: requests at
    once.
    """

    tokens: int
    memory_tokens: int
    rows: int


def buckets(positions: int, rows: int, base_bytes: int = 0, token_bytes: int = 0) -> list[Bucket]:
    """Buckets up to all positions of a base, by rising size.

    A step reads the base once and the cache of every row, taken or free. So a bucket's rows are no
    more than have a cache of the base's size, or of the smallest bucket's with all its rows: beyond
    that rows save nothing, and a step of few requests pays for all.

    rows: of the small ones. base_bytes, token_bytes: of the base, and of a token's keys and values
    in all layers; 0 where that is not to be considered.
    """
    sizes = [SMALLEST]
    while sizes[-1] < positions:
        sizes.append(min(GROWTH * sizes[-1], positions))
    sizes[-1] = min(sizes[-1], positions)
    row_bytes = {n: token_bytes * (n + padded(n)) for n in sizes}
    most_bytes = max(base_bytes, rows * row_bytes[sizes[0]])

    def rows_of(n: int) -> int:
        most = most_bytes // row_bytes[n] if token_bytes else rows
        return max(1, min(rows, rows * FULL_ROWS // n, most))

    return [Bucket(n, padded(n), rows_of(n)) for n in sizes]


def without_memory(sizes: Sequence[Bucket]) -> list[Bucket]:
    """Buckets of the same sizes, but for the smallest, for requests that read no memory.

    A long text that is read as it is would look through a place for a memory as long as itself.
    """
    return [bucket._replace(memory_tokens=0) for bucket in sizes[1:]]


class Piece(NamedTuple):
    """What a request has grown by.

    Attributes:
        text: whole characters.
        ids: new tokens.
        log_probs: of the new tokens, nats.
        alternatives: for each new token `(ids, log-probabilities)` of the most likely ones.
        finish: why it has ended, "stop" or "length"; None while it goes on.
        error: why it was given up, if so.
    """

    text: str = ""
    ids: Sequence[int] = ()
    log_probs: Sequence[float] = ()
    alternatives: Sequence[tuple[list[int], list[float]]] = ()
    finish: str | None = None
    error: ApiError | None = None

    @property
    def last(self) -> bool:
        """Whether nothing comes after it."""
        return self.finish is not None or self.error is not None


class Job:
    """A request with who waits for it.

    Attributes:
        request: what the engine decodes; its tag is taken by the scheduler.
        deliver: called with each piece.
        streamed: whether pieces are wanted as they come; else there is one, the last.
        cancelled: whether nobody waits any more.
        first_seconds: from now to its first new token; None before that.
    """

    def __init__(self, request: Request, deliver: Callable[[Piece], None], streamed: bool = False):
        self.request = request._replace(tag=self)
        self.deliver, self.streamed, self.cancelled = deliver, streamed, False
        self._taken = 0  # tokens that were delivered
        self._began = time.monotonic()
        self.first_seconds: float | None = None
        self.running: Running | None = None

    def moved(self) -> None:
        """Notes that it has a new token."""
        if self.first_seconds is None:
            self.first_seconds = time.monotonic() - self._began

    def piece(self) -> Piece:
        """What has come since this was last asked."""
        running, first = self.running, self._taken
        self._taken = last = len(running.ids)
        finish = None
        if running.error is not None:
            return Piece(error=ApiError(500, str(running.error), code="not_finite"))
        if running.done:
            finish = "stop" if running.stopped else "length"
        return Piece(
            running.take_text(),
            running.ids[first:last],
            running.log_probs[first:last],
            running.alternatives[first:last],
            finish,
        )


class Full(Exception):
    """The queue is full. seconds: after which a client may try again."""

    def __init__(self, seconds: int):
        super().__init__(f"the queue is full; try again in {seconds} s")
        self.seconds = seconds


class _Lane:
    """A bucket: its engine, and the jobs that wait for a row of it."""

    def __init__(self, bucket: Bucket):
        self.bucket, self.waiting = bucket, collections.deque[Job]()
        self.engine: Engine | None = None
        self.jobs: set[Job] = set()  # those that have a row

    def holds(self, request: Request) -> bool:
        """Whether a request fits into a row."""
        memory = 0 if request.prefix is None else request.prefix.mask.shape[1]
        tokens = len(request.prompt) + request.sampling.max_new_tokens
        return tokens <= self.bucket.tokens and memory <= self.bucket.memory_tokens


class Scheduler:
    """Runs jobs on engines, on a thread of its own.

    Args:
        make_engine: makes the engine of a bucket.
        sizes: the buckets, by rising size.
        queue: jobs that may wait for a row.
        call: has a function called where pieces are delivered, such as an event loop's
            `call_soon_threadsafe`.
    """

    def __init__(self, make_engine: MakeEngine, sizes: Sequence[Bucket], queue: int, call: Call):
        self._make_engine, self._queue, self._call = make_engine, queue, call
        self._lanes = [_Lane(bucket) for bucket in sizes]
        self._new: list[Job] = []
        self._condition = threading.Condition()
        self._stopping = self._cancelled = False
        self._waiting = 0  # jobs that have no row yet
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)

    def start(self) -> None:
        """Starts the thread, unless it was stopped before."""
        with self._condition:
            if not self._stopping:
                self._thread.start()

    def stop(self) -> None:
        """Ends the thread; what runs is given up."""
        with self._condition:
            self._stopping = True
            self._condition.notify()
        if self._thread.is_alive():
            self._thread.join()

    # --- Any thread ---

    def submit(self, jobs: Sequence[Job], least_seconds: float = 1.0) -> None:
        """Takes the jobs of a request: all or none.

        least_seconds: told to a client that finds the queue full. `Full` if they may not wait;
        `ApiError` if one fits into no bucket.
        """
        for job in jobs:
            self._lane(job.request)
        if len(jobs) > self._queue:
            raise ApiError(
                400,
                f"prompts and n ask for {len(jobs)} answers at once, the server takes at most "
                f"{self._queue}; ask for fewer",
                "n",
            )
        with self._condition:
            if self._stopping:
                raise ApiError(503, "the server is shutting down", code="draining")
            if self._waiting + len(jobs) > self._queue:
                raise Full(max(1, math.ceil(least_seconds)))
            self._waiting += len(jobs)
            self._new += jobs
            self._condition.notify()

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Gives jobs up; their rows are free before the next step."""
        with self._condition:
            for job in jobs:
                job.cancelled = True
            self._cancelled = True
            self._condition.notify()

    @property
    def waiting(self) -> int:
        """Jobs that wait for a row."""
        return self._waiting

    @property
    def running(self) -> int:
        """Jobs that have a row."""
        return sum(len(lane.jobs) for lane in self._lanes)

    @property
    def rows(self) -> int:
        """Rows of the engines that were made."""
        engines = [lane.engine for lane in self._lanes]
        return sum(engine.rows for engine in engines if engine is not None)

    def _lane(self, request: Request) -> _Lane:
        """The smallest bucket that holds a request."""
        fitting = [lane for lane in self._lanes if lane.holds(request)]
        if fitting:
            return min(fitting, key=lambda lane: (lane.bucket.tokens, lane.bucket.memory_tokens))
        largest = self._lanes[-1].bucket
        raise ApiError(
            400,
            f"a prompt of {len(request.prompt)} tokens with {request.sampling.max_new_tokens} new "
            f"ones is more than the {largest.tokens} tokens of the longest row; shorten one",
            code="context_length_exceeded",
        )

    # --- The thread ---

    def warm_up(
        self, requests: Callable[[Bucket], Sequence[Sequence[Request]]], count: int
    ) -> None:
        """Compiles what the first requests will need; before `start`.

        requests: of a bucket, some that run together at a time. count: of the smallest buckets.
        """
        for lane in self._lanes[:count]:
            lane.engine = self._make_engine(lane.bucket)
            for together in requests(lane.bucket):
                if self._stopping:
                    return
                list(lane.engine.run(together))

    def _run(self):
        while self._take():
            pieces: list[tuple[Job, Piece]] = []
            for lane in self._lanes:
                try:
                    self._drop_cancelled(lane)
                    pieces += self._fill(lane)
                    pieces += self._step(lane)
                except Exception as error:  # the thread goes on, or nobody would be answered
                    pieces += self._give_up(lane, of_fault(error))
            if pieces:
                self._call(lambda pieces=pieces: _deliver(pieces))

    def _take(self) -> bool:
        """Waits for something to do, and takes new jobs. False: stop."""
        with self._condition:
            while not (self._new or self._stopping or self._cancelled or self._busy()):
                self._condition.wait()
            new, self._new, self._cancelled = self._new, [], False
            if self._stopping:
                return False
        for job in new:
            self._lane(job.request).waiting.append(job)
        return True

    def _busy(self):
        return any(lane.waiting or lane.jobs for lane in self._lanes)

    def _drop_cancelled(self, lane):
        waiting = [job for job in lane.waiting if not job.cancelled]
        self._leave_queue(len(lane.waiting) - len(waiting))
        lane.waiting = collections.deque(waiting)
        for job in [job for job in lane.jobs if job.cancelled]:
            lane.jobs.remove(job)
            lane.engine.remove(job.running)

    def _leave_queue(self, count):
        if count:
            with self._condition:
                self._waiting -= count

    def _fill(self, lane) -> Iterator[tuple[Job, Piece]]:
        """Gives waiting jobs rows; yields those that cannot have one."""
        while lane.waiting:
            if lane.engine is None and not self._open(lane):
                self._leave_queue(len(lane.waiting))
                yield from ((job, Piece(error=no_room())) for job in lane.waiting)
                lane.waiting.clear()
                return
            job = lane.waiting[0]
            try:
                running = lane.engine.insert(job.request)
            except UserError as error:
                lane.waiting.popleft()
                self._leave_queue(1)
                yield job, Piece(error=ApiError(400, str(error), code="invalid_value"))
                continue
            if running is None:
                return
            lane.waiting.popleft()
            self._leave_queue(1)
            job.running = running
            lane.jobs.add(job)

    def _open(self, lane) -> bool:
        """Makes a bucket's engine: with half of the rows where memory does not suffice."""
        while True:
            try:
                lane.engine = self._make_engine(lane.bucket)
                return True
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                _tell(f"no memory for {lane.bucket}")
                if lane.bucket.rows == 1:
                    return False
                lane.bucket = lane.bucket._replace(rows=lane.bucket.rows // 2)

    def _give_up(self, lane, failure) -> list[tuple[Job, Piece]]:
        """Ends all that a bucket has, and its engine, whose state is not known."""
        jobs = [*lane.jobs, *lane.waiting]
        self._leave_queue(len(lane.waiting))
        lane.jobs, lane.engine = set(), None
        lane.waiting.clear()
        return [(job, Piece(error=failure)) for job in jobs]

    def _step(self, lane) -> list[tuple[Job, Piece]]:
        """One step of a bucket; what is to be delivered."""
        if not lane.jobs:
            return []
        try:
            moved = lane.engine.step()
        except Exception as error:
            # Its cache was given to the program that failed, so the engine is made anew.
            jobs, lane.jobs, lane.engine = lane.jobs, set(), None
            if is_out_of_memory(error):
                _tell(f"no memory for a step of {lane.bucket}")
                lane.bucket = lane.bucket._replace(rows=max(1, lane.bucket.rows // 2))
                failure = no_room()
            else:
                failure = of_fault(error)
            return [(job, Piece(error=failure)) for job in jobs]
        pieces = []
        for running in moved:
            job = running.request.tag
            job.moved()
            if running.done:
                lane.jobs.discard(job)
            if running.done or job.streamed:
                pieces.append((job, job.piece()))
        return pieces


def _deliver(pieces):
    for job, piece in pieces:
        if not job.cancelled:
            job.deliver(piece)


def no_room() -> ApiError:
    """What a client is told where devices have too little memory."""
    return ApiError(
        503,
        "the devices have no memory for a request of this size; try again, or send a shorter one",
        code="out_of_memory",
        headers={"Retry-After": str(RETRY_SECONDS)},
    )


def _tell(text):
    print(f"icae serve: {text}", file=sys.stderr, flush=True)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether devices or host had too little memory."""
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)

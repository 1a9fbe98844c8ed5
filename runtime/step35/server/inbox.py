"""Jobs on their way to the engine's thread, as many as the limits allow, and the word to end."""

import queue
import threading

from step35.server.job import Job
from step35.server.policy import Limits


class Inbox:
    """Callable from any thread; the engine's thread alone receives."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._n_taken = 0
        self.drain_until_s = float("inf")
        """When what still runs must end, on the scheduler's clock."""

    def put(self, job: Job) -> bool:
        """Takes a job; returns False if the limits are reached."""
        with self._lock:
            if self._n_taken >= self._limits.n_jobs:
                return False
            self._n_taken += 1
        self._jobs.put(job)
        return True

    def count_out(self) -> None:
        """Makes room for another job, now that one has ended."""
        with self._lock:
            self._n_taken -= 1

    def notify(self) -> None:
        """Ends a wait in `receive`."""
        self._jobs.put(None)

    @property
    def is_draining(self) -> bool:
        return self.drain_until_s != float("inf")

    @property
    def is_empty(self) -> bool:
        return self._jobs.empty()

    def receive(self, timeout_s: float) -> list[Job]:
        """Returns the jobs that have come; waits for the first, so long at most."""
        jobs: list[Job] = []
        try:
            job = self._jobs.get(timeout=timeout_s) if timeout_s else self._jobs.get_nowait()
            while True:
                jobs += [job] if job is not None else []
                job = self._jobs.get_nowait()
        except queue.Empty:
            return jobs

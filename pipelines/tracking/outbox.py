"""Entries for a server, kept on disk until it has them, so that whoever puts them there never waits for it.

An entry is a JSON file, committed under the next number and deleted once it is sent. What a killed process leaves is sent by
the next one. An entry may be sent twice, and must be such that this does no harm.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from ddpm_core import typed
from ddpm_core.commit import remove_leftovers, write_json
from ddpm_core.errors import one_line
from pipelines.runtime.progress import Say
from pipelines.tracking.retry import pauses, without_retries

LONGEST_CLOSING_PAUSE = 1.0  # seconds between tries while close() waits

Entry = Mapping[str, Any]


class Call(TypedDict):
    """What every entry has: the name of what is to be done."""

    call: str


class Unsent:
    """Entries in a folder, sent in their order: by flush() those that lie there, by a thread of its own those that come later.

    send: called with an entry; if it raises, the entry is sent again. say: gets a sentence when sending begins to fail, and
    when it works again.
    """

    def __init__(self, folder: Path, send: Callable[[Entry], object], say: Say) -> None:
        self.folder, self._send, self._say = folder, send, say
        if folder.is_dir():
            remove_leftovers(folder)
        self._waiting = deque(sorted(folder.glob("*.json")))
        self._number = int(self._waiting[-1].stem) if self._waiting else 0
        self._wake, self._closing, self._given_up = threading.Event(), threading.Event(), threading.Event()
        self._last_sent = 0.0  # in time.monotonic()
        self._thread = threading.Thread(target=self._run, name="unsent", daemon=True)

    def __len__(self) -> int:
        return len(self._waiting)

    def flush(self) -> None:
        """Send what lies there, before start(). Raises what `send` raises."""
        while self._waiting:
            self._send_first()
        self._remove_folder()

    def start(self) -> None:
        """Start the thread that sends what is put."""
        self._thread.start()

    def put(self, entry: Entry) -> None:
        """Add an entry, or say why that failed: a full disk must not end the training that puts it there."""
        self._number += 1
        path = self.folder / f"{self._number:010d}.json"
        try:
            self.folder.mkdir(exist_ok=True)  # not its parents: if those are gone, a disk is no longer mounted
            write_json(path, entry)
        except OSError as error:
            self._say(
                f"tracking: {entry.get('call')} is lost ({one_line(error)}): records come back with the next checkpoint"
            )
            return
        self._waiting.append(path)
        self._wake.set()

    def close(self, wait: float) -> int:
        """Have the thread send the rest and end, for as long as no `wait` seconds pass without an entry sent. How many
        entries are left."""
        if self._thread.is_alive():
            self._last_sent = time.monotonic()
            self._closing.set()
            self._wake.set()
            while self._thread.is_alive() and time.monotonic() - self._last_sent < wait:
                self._thread.join(0.05)
            self._given_up.set()
            self._wake.set()
        self._remove_folder()
        return len(self)

    def _run(self) -> None:
        """Send entries as they come, until close()."""
        while not self._given_up.is_set():
            self._wake.clear()
            if self._waiting:
                self._send_until_done()
            elif self._closing.is_set():
                return
            else:
                self._wake.wait()

    def _send_until_done(self) -> None:
        """Send the first entry, as often as it takes."""
        failing = False
        for pause in pauses():
            try:
                with without_retries():
                    self._send_first()
            except Exception as error:
                if not failing:
                    self._say(
                        f"tracking: MLflow does not answer ({one_line(error)}); the training goes on, and what is for MLflow "
                        f"waits in {str(self.folder)!r}"
                    )
                failing = True
                self._pause(pause)
                if self._given_up.is_set():
                    return
            else:
                self._last_sent = time.monotonic()
                if failing:
                    self._say("tracking: MLflow answers again")
                return

    def _pause(self, seconds: float) -> None:
        """Wait before the next try: not at all if close() comes meanwhile, and briefly if it has been called."""
        if self._closing.is_set():
            self._given_up.wait(min(seconds, LONGEST_CLOSING_PAUSE))
        else:
            self._closing.wait(seconds)

    def _send_first(self) -> None:
        """Send the first entry and delete it; a damaged one is deleted alone."""
        path = self._waiting[0]
        try:
            entry = typed.parse_json(path.read_bytes(), Call)
        except (FileNotFoundError, ValueError) as error:
            self._say(f"tracking: {str(path)!r} is damaged ({one_line(error)}) and left out")
        else:
            self._send(entry)
        path.unlink(missing_ok=True)
        self._waiting.popleft()

    def _remove_folder(self) -> None:
        if not self._waiting and self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()

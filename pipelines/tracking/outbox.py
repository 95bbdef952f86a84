"""What a server shall have, kept on disk until it has it: the one who puts it there never waits for a server.

An entry is a JSON file, committed under the next number and deleted when it was sent. What a killed process leaves is sent
by the next one; an entry may therefore be sent twice, and must be of the kind that can.
"""

import json
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ddpm_core.commit import remove_leftovers, write_json
from pipelines.runtime.progress import Say
from pipelines.tracking.retry import at_once, pauses, reason

CLOSING_PAUSE = 1.0  # seconds between tries, at most, when somebody waits for the end

Entry = Mapping[str, Any]


class Unsent:
    """Entries in a folder, sent in their order: those that are there by flush(), later ones by a thread of its own.

    send: what is called with an entry; whatever it raises, the entry is sent again. say: told what does not work, once,
    and when it does again.
    """

    def __init__(self, folder: Path, send: Callable[[Entry], object], say: Say) -> None:
        self.folder, self._send, self._say = folder, send, say
        if folder.is_dir():
            remove_leftovers(folder)
        self._waiting = deque(sorted(folder.glob("*.json")))
        self._number = int(self._waiting[-1].stem) if self._waiting else 0
        self._wake, self._closing, self._given_up = threading.Event(), threading.Event(), threading.Event()
        self._progress = 0.0
        self._thread = threading.Thread(target=self._run, name="unsent", daemon=True)

    def __len__(self) -> int:
        return len(self._waiting)

    def flush(self) -> None:
        """Send what is there, before start(); raises what `send` raises."""
        while self._waiting:
            self._send_first()
        self._remove_folder()

    def start(self) -> None:
        self._thread.start()

    def put(self, entry: Entry) -> None:
        """Add an entry, or say why that failed: a full disk must not end the one who puts it there."""
        self._number += 1
        path = self.folder / f"{self._number:010d}.json"
        try:
            self.folder.mkdir(exist_ok=True)  # only itself: a folder above it that is gone is an unmounted disk
            write_json(path, entry)
        except OSError as error:
            self._say(
                f"tracking: {entry.get('call')} is lost ({reason(error)}): records come back with the next checkpoint"
            )
            return
        self._waiting.append(path)
        self._wake.set()

    def close(self, wait: float) -> int:
        """Have the thread send the rest and end, waiting for as long as no `wait` seconds pass without an entry sent. How
        many entries are left."""
        if self._thread.is_alive():
            self._progress = time.monotonic()
            self._closing.set()
            self._wake.set()
            while self._thread.is_alive() and time.monotonic() - self._progress < wait:
                self._thread.join(0.05)
            self._given_up.set()
            self._wake.set()
        self._remove_folder()
        return len(self)

    def _run(self) -> None:
        failing, wait = False, pauses()
        while not self._given_up.is_set():
            self._wake.clear()
            if not self._waiting:
                if self._closing.is_set():
                    return
                self._wake.wait()
                continue
            try:
                with at_once():
                    self._send_first()
            except Exception as error:
                if not failing:
                    self._say(
                        f"tracking: MLflow does not answer ({reason(error)}); the training goes on, and what is for MLflow waits "
                        f"in {str(self.folder)!r}"
                    )
                failing, pause = True, next(wait)
                if self._closing.is_set():
                    self._given_up.wait(min(pause, CLOSING_PAUSE))
                else:
                    self._closing.wait(pause)
            else:
                self._progress = time.monotonic()
                if failing:
                    self._say("tracking: MLflow answers again")
                failing, wait = False, pauses()

    def _send_first(self) -> None:
        path = self._waiting[0]
        try:
            entry = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError) as error:
            self._say(f"tracking: {str(path)!r} is damaged ({reason(error)}) and left out")
        else:
            self._send(entry)
        path.unlink(missing_ok=True)
        self._waiting.popleft()

    def _remove_folder(self) -> None:
        if not self._waiting and self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()

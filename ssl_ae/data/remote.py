"""Data sets by URL: shards are fetched whole into a bounded cache on this machine, checked, and read from there.

Not as webdataset streams them: it gives samples in the order of the bytes, so that a run could not go on in the middle
of an epoch, and takes a transfer that was cut between two members for the end of the shard.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import threading
import time
import uuid
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from ssl_ae import files
from ssl_ae.data.card import FILE_NAME, LABELS_FILE_NAME, Shard
from ssl_ae.data.damage import Damage
from ssl_ae.errors import DataError, listing

SCHEMES = ("file", "http", "https", "s3")
ATTEMPTS, FIRST_WAIT_SECONDS = 4, 1.0  # the wait doubles: about seven seconds in all
SILENCE_SECONDS = 60  # without a byte: an interrupted transfer
CACHE_GB = 20.0
FETCHERS = 4  # shards at once
TOUCH_SECONDS = 60  # between two marks that a shard is in use
ROOM = ".room.tmp"  # ends the name of a file as long as a shard that is on its way
STALE_SECONDS = 3600  # a half file that nobody has written to for so long is nobody's
TAR = re.compile(r"[^/\\.][^/\\]*\.tar")


def is_url(place: str) -> bool:
    """Whether a place is a URL that data are read from."""
    return place.partition(":")[0].lower() in SCHEMES and ":" in place


def scheme_of(place: str | Path) -> str | None:
    """The scheme of a URL, nothing for a path. Raises DataError for any scheme but those that are read."""
    found = re.match(r"([A-Za-z][A-Za-z0-9+.-]*):", str(place))
    if found is None:
        return None
    scheme = found[1].lower()
    if scheme not in SCHEMES or "::" in str(place):
        raise DataError(
            f"{place}: data are read from folders and from URLs of {listing([f'{s}:' for s in SCHEMES], 'and')}, nothing else. "
            "Put ./ before the name of a local folder that has a colon."
        )
    return scheme


def opened(place: str | Path) -> Path | Remote:
    """A folder on this machine, or the data set behind a URL. Raises DataError for a URL of a scheme that is not read."""
    scheme = scheme_of(place)
    if scheme is None:
        return Path(place)
    parts = urlsplit(str(place))
    if scheme == "file":
        if parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
            raise DataError(f"{place}: expected file:///FOLDER on this machine, an absolute path.")
        return Path(unquote(parts.path))
    if not parts.netloc:
        raise DataError(f"{place}: expected {'s3://BUCKET' if scheme == 's3' else f'{scheme}://HOST'}/FOLDER.")
    return Remote(str(place), scheme)


class Remote:
    """A folder of shards behind a URL. `folder` holds what is small of it; shards lie in the cache by their sha256.

    The cache (`SSL_AE_CACHE`, else among the user's caches) is shared by all processes of a machine and holds at most
    `SSL_AE_CACHE_GB` of shards (20); the one unused for longest makes room.
    """

    def __init__(self, url: str, scheme: str) -> None:
        self.url = url.rstrip("/")
        self.folder = files.make_folder(files.cache_folder() / "remote" / files.digest(self.url)[:32])
        self._shards = files.make_folder(files.cache_folder() / "shards")
        self._bound = _bound()
        self._system = _file_system(scheme, self.url)
        self._touched: dict[str, float] = {}
        self._damaged: dict[str, Damage] = {}
        self._wanted: deque[Shard] = deque()
        self._fetchers: list[threading.Thread] = []

    def fetch_card(self) -> bool:
        """Bring card and labels as they are now into `folder`; whether there is a card. Raises DataError."""
        for name in (FILE_NAME, LABELS_FILE_NAME):
            target = self.folder / name
            try:
                with files.whole_file(target) as aside:
                    self._transfer(name, aside)
            except FileNotFoundError:
                target.unlink(missing_ok=True)
                if name == FILE_NAME:
                    return False
        return True

    def fetch_shards(self) -> None:
        """Bring all shards of a set without a card into `folder`, where they are walked. Raises DataError."""
        there = {_name(entry): entry for entry in self._listing()}
        there = {name: entry for name, entry in there.items() if TAR.fullmatch(name)}
        if not there:
            raise DataError(
                f"{self.url} holds neither a card.json nor .tar shards. Make a data set with `ssl-ae data pack SOURCE DIR` "
                "and upload DIR."
            )
        total = sum(int(entry.get("size") or 0) for entry in there.values())
        if total > self._bound:
            raise DataError(
                f"{self.url} has no card.json, so its {total / 1e9:,.1f} GB must be here at once, and SSL_AE_CACHE_GB allows "
                f"{self._bound / 1e9:,.1f}. Allow more, or pack the set where it lies and read that."
            )
        with self._lock(self.folder.name):
            origin = self.folder / "origin.json"
            known = _read_known(origin)
            for name, entry in there.items():
                mark = [str(entry.get(field)) for field in ("size", "ETag", "LastModified", "mtime")]
                if known.get(name) != mark or not (self.folder / name).exists():
                    with files.whole_file(self.folder / name) as aside:
                        self._transfer(name, aside, entry.get("size"))
                    known[name] = mark
                    files.write_json(origin, known)
            for stale in self.folder.glob("*.tar"):
                if stale.name not in there:
                    stale.unlink()

    def shard(self, shard: Shard) -> Path:
        """Where a shard of the card lies now; fetched where it does not. Raises DataError naming it where it cannot be."""
        path = self._place(shard)
        if not _is_whole(path, shard):
            with self._lock(shard.sha256[:2]):  # another thread or rank may be fetching it
                if not _is_whole(path, shard):
                    self._fetch(shard, path)
        now = time.monotonic()
        if now - self._touched.get(shard.sha256, -TOUCH_SECONDS) >= TOUCH_SECONDS:
            self._touched[shard.sha256] = now
            with contextlib.suppress(OSError):
                os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))
        return path

    def expect(self, shards: Sequence[Shard]) -> None:
        """Begin to fetch shards that will soon be read, in this order and before others, as far as half the cache holds them."""
        room, wanted = self._bound // 2, deque()
        for shard in {shard.sha256: shard for shard in (*shards, *self._wanted.copy())}.values():
            room -= shard.bytes
            if room >= 0 and not self.holds(shard):
                wanted.append(shard)
        self._wanted = wanted
        self._fetchers = [thread for thread in self._fetchers if thread.is_alive()]
        for _ in range(min(FETCHERS, len(wanted)) - len(self._fetchers)):
            # daemons: who leaves does not wait for shards that nobody will read
            self._fetchers.append(threading.Thread(target=self._fetch_wanted, daemon=True, name="fetch"))
            self._fetchers[-1].start()

    def _fetch_wanted(self) -> None:
        while True:
            try:
                shard = self._wanted.popleft()
            except IndexError:
                return
            with contextlib.suppress(Exception):  # who reads the shard meets the same error, and tells it
                self.shard(shard)

    def holds(self, shard: Shard) -> bool:
        return _is_whole(self._place(shard), shard)

    def keys_of(self, shard: Shard) -> list[str] | None:
        """Keys of a shard that was here once."""
        found = _read_known(self._keys_file(shard)).get("keys")
        return found if isinstance(found, list) and len(found) == shard.rows else None

    def keep_keys(self, shard: Shard, keys: list[str]) -> None:
        files.make_folder(self._keys_file(shard).parent)
        files.write_text(self._keys_file(shard), json.dumps({"keys": keys}, ensure_ascii=False))

    def _keys_file(self, shard: Shard) -> Path:
        return self._shards.parent / "keys" / f"{_sha256(shard)}.json"

    def _place(self, shard: Shard) -> Path:
        return self._shards / f"{_sha256(shard)}.tar"

    def _fetch(self, shard: Shard, path: Path) -> None:
        if shard.bytes > self._bound:
            raise DataError(f"{self.url}/{shard.file} has {shard.bytes:,} bytes, more than SSL_AE_CACHE_GB allows. Allow more.")
        with self._room(shard.bytes):
            self._fetch_whole(shard, path)

    def _fetch_whole(self, shard: Shard, path: Path) -> None:
        if known := self._damaged.get(shard.sha256):
            raise known
        for last in (False, True):  # what was damaged on the way may arrive whole the second time
            try:
                with files.whole_file(path) as aside:
                    self._transfer(shard.file, aside, shard.bytes)
                    if files.sha256_of(aside) != shard.sha256:
                        raise Damage(f"{self.url}/{shard.file} is damaged: its sha256 is not the card's. Upload it again.")
                return
            except FileNotFoundError as error:
                raise Damage(f"{self.url}/{shard.file} is not there. Upload it again.") from error
            except Damage as error:
                if last:
                    self._damaged[shard.sha256] = error
                    raise

    def _transfer(self, name: str, target: Path, size: int | None = None) -> None:
        """Bring a file here whole. Raises FileNotFoundError where there is none, else DataError naming it."""
        url = f"{self.url}/{name}"
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(FIRST_WAIT_SECONDS * 2 ** (attempt - 1))
            try:
                self._system.get_file(url, str(target))
                found = target.stat().st_size
                if size in (None, found):
                    return
                error: Exception = OSError(f"{found:,} of {size:,} bytes arrived")
            except FileNotFoundError:
                raise
            except PermissionError as caught:
                raise DataError(f"{url} may not be read: {_said(caught)}. Check the address and the credentials.") from caught
            except Exception as caught:  # each library has errors of its own for a broken connection
                error = caught
            target.unlink(missing_ok=True)
        raise DataError(
            f"{url} could not be fetched in {ATTEMPTS} attempts: {_said(error)}. Run the same command once it can be reached."
        ) from error

    def _listing(self) -> list[dict[str, Any]]:
        try:
            return self._system.ls(self.url + "/", detail=True)
        except FileNotFoundError as error:
            raise DataError(f"there is no {self.url}, or it cannot be listed. Check the address.") from error
        except Exception as error:  # each library has errors of its own
            raise DataError(f"{self.url} cannot be listed: {_said(error)}. Check the address and the credentials.") from error

    @contextlib.contextmanager
    def _room(self, size: int) -> Iterator[None]:
        """Keep so many bytes of the cache for the block, whoever else fetches meanwhile."""
        kept = self._shards / f".{uuid.uuid4().hex}{ROOM}"
        with self._lock("room"):
            self._remove_unused(size)
            with open(kept, "wb") as file:
                file.truncate(size)  # a hole: its length is counted, and takes no place on the disk
        try:
            yield
        finally:
            kept.unlink(missing_ok=True)

    def _remove_unused(self, size: int) -> None:
        """Remove the shards that are unused for longest until there is room; a map that somebody holds stays readable."""
        taken, lying = size, []
        for path in self._shards.iterdir():
            with contextlib.suppress(OSError):
                status = path.stat()
                if path.name.endswith(".tmp") and time.time() - status.st_mtime > STALE_SECONDS:
                    path.unlink()  # of a process that was killed
                elif path.suffix == ".tar":
                    lying.append((status.st_atime_ns, status.st_size, path))
                if path.suffix == ".tar" or path.name.endswith(ROOM):
                    taken += status.st_size
        for _, freed, path in sorted(lying):
            if taken <= self._bound:
                return
            path.unlink(missing_ok=True)
            taken -= freed

    @contextlib.contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        import fcntl  # not on every system, and only data by URL need it

        folder = files.make_folder(self._shards.parent / "locks")
        with open(folder / name, "a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _sha256(shard: Shard) -> str:
    if not re.fullmatch(r"[0-9a-f]{64}", shard.sha256):  # it becomes the name of a file
        raise DataError(f"the card's sha256 of {shard.file} is {shard.sha256[:80]!r}, which is none. Pack the source again.")
    return shard.sha256


def _is_whole(path: Path, shard: Shard) -> bool:
    try:
        return path.stat().st_size == shard.bytes
    except OSError:
        return False


def _name(entry: dict[str, Any]) -> str:
    return unquote(urlsplit(str(entry["name"])).path).rstrip("/").rpartition("/")[2]


def _read_known(path: Path) -> dict[str, Any]:
    try:
        found = files.read_json(path)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _said(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _bound() -> int:
    text = os.environ.get("SSL_AE_CACHE_GB", str(CACHE_GB))
    try:
        bound = int(float(text) * 1e9)
    except (ValueError, OverflowError):
        bound = 0
    if bound <= 0:
        raise DataError(f"SSL_AE_CACHE_GB = {text!r}: expected gigabytes above 0, such as 20.")
    return bound


def _file_system(scheme: str, url: str) -> Any:
    try:
        import fsspec

        if scheme == "s3":
            return fsspec.filesystem("s3", config_kwargs={"connect_timeout": SILENCE_SECONDS, "read_timeout": SILENCE_SECONDS})
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=SILENCE_SECONDS, sock_read=SILENCE_SECONDS)
        return fsspec.filesystem(scheme, client_kwargs={"timeout": timeout})
    except ImportError as error:
        raise DataError(f"{url}: data by URL need the extra s3: pip install 'ssl-ae[s3]' ({error}).") from error

"""Reading cache.json, whose presence says that a cache is finished."""

from __future__ import annotations

from typing import Any

from llavamod_offline.errors import CacheError
from llavamod_offline.storage.folders import Folder, LocalFolder
from llavamod_offline.storage.remote import RemoteFolder
from llavamod_offline.storage.walk import no_folder
from teacher_cache.format.manifest import CACHE_NAME, JOB_NAME, has_own_digest, parse_object, way_to_finish
from teacher_cache.read.shard_files import VERIFY


def check_folder(folder: Folder) -> None:
    """Refuse a cache whose folder does not exist. Errors: `CacheError`."""
    if isinstance(folder, LocalFolder) and not folder.path.is_dir():
        raise CacheError(f"cache '{folder.where}': {no_folder(folder.path)}: create one with `cache-teacher run`")


def read_cache_file(folder: LocalFolder | RemoteFolder) -> tuple[dict[str, Any], int]:
    """Parse cache.json; also return its size. Errors: `CacheError` if it is missing or damaged."""
    where = folder.where
    check_folder(folder)
    content = _if_there(folder, CACHE_NAME)  # read, not looked up in a listing, which some servers lack
    if content is None:
        begun = _if_there(folder, JOB_NAME)
        if begun is None:
            raise CacheError(
                f"cache '{where}': has no {CACHE_NAME}, so it is not a teacher cache: see `cache-teacher run`"
            )
        job = parse_object(begun, f"{where}/{JOB_NAME}", way_out=VERIFY)
        try:
            finish = way_to_finish(job["fingerprint"])
        except (KeyError, TypeError) as error:
            raise CacheError(f"{where}/{JOB_NAME}: damaged: {VERIFY}") from error
        raise CacheError(f"cache '{where}': unfinished ({CACHE_NAME} is missing): rerun {finish} to finish it")
    parsed = parse_object(content, f"{where}/{CACHE_NAME}", way_out=VERIFY)
    if not has_own_digest(content, parsed):
        raise CacheError(f"{where}/{CACHE_NAME}: damaged (wrong digest): {VERIFY}")
    return parsed, len(content)


def _if_there(folder: LocalFolder | RemoteFolder, name: str) -> bytes | None:
    try:
        return folder.read(name)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CacheError(f"{folder.where}/{name}: cannot be read: {error.strerror or error}: {VERIFY}") from error

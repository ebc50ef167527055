"""What is mounted into a container: folders of this machine that stand for the pod's volumes."""

import os
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mooncake.core.errors import ConfigError
from tests.kube.standin.environment import Lookup, content, field

Object = dict[str, Any]
DATA = "..data"
"""As a kubelet does it: a link that is switched to a new folder, so that all files change at once."""


@dataclass(frozen=True)
class Mount:
    """One bind mount."""

    source: Path
    target: str
    read_only: bool


@dataclass(frozen=True)
class Places:
    """Where volumes lie."""

    pod: Path
    """Of this pod; goes with it."""
    memory: Path
    """The same, in memory."""
    node: Path
    """Stands for the root of the node's disk: hostPath volumes."""
    claims: Path
    """One folder for each persistent volume claim; outlives pods."""
    given: Mapping[str, Path]
    """Claim -> a folder that is there already."""


class Volumes:
    """The volumes of one pod."""

    def __init__(self, pod: Object, places: Places, lookup: Lookup) -> None:
        self._pod, self._places, self._lookup = pod, places, lookup
        self._folders: dict[str, Path] = {}
        self._live: list[tuple[Path, Object]] = []  # what follows a ConfigMap or Secret
        self._written: dict[Path, dict[str, tuple[bytes, int]]] = {}
        self._group = pod["spec"].get("securityContext", {}).get("fsGroup")

    def prepare(self) -> None:
        """Make every volume.

        Raises:
            ConfigError: what one is made of does not exist, or its kind is not known here.
        """
        for volume in self._pod["spec"].get("volumes", []):
            if volume["name"] not in self._folders:
                self._folders[volume["name"]] = self._folder(volume)

    def mounts(self, container: Object) -> list[Mount]:
        """Return the mounts of a container, outer folders before inner ones."""
        found = []
        for one in container.get("volumeMounts", []):
            source = self._folders[one["name"]]
            if sub := one.get("subPath"):
                source = source / sub
                if not source.exists():
                    source.mkdir(parents=True)
            target = "/" + os.path.normpath(one["mountPath"]).strip("/")
            found.append(Mount(source.resolve(), target, one.get("readOnly", False)))
        return sorted(found, key=lambda mount: mount.target)

    def refresh(self) -> None:
        """Write anew what has changed in ConfigMaps and Secrets."""
        for folder, volume in self._live:
            self._write(folder, self._files(volume))

    def _folder(self, volume: Object) -> Path:
        name: str = volume["name"]
        if "emptyDir" in volume:
            in_memory = (volume["emptyDir"] or {}).get("medium") == "Memory"
            folder = (self._places.memory if in_memory else self._places.pod) / "volumes" / name
            folder.mkdir(parents=True)
            folder.chmod(0o777)
            self._give(folder)
            return folder
        if "hostPath" in volume:
            return self._host_path(volume["hostPath"])
        if claim := volume.get("persistentVolumeClaim"):
            name = str(claim["claimName"])
            if given := self._places.given.get(name):
                return given
            if self._lookup("persistentvolumeclaims", name) is None:
                raise ConfigError(f'persistentvolumeclaim "{name}" not found')
            folder = self._places.claims / str(self._pod["metadata"]["namespace"]) / name
            folder.mkdir(parents=True, exist_ok=True)
            self._give(folder)
            return folder
        folder = self._places.pod / "volumes" / name
        files = self._files(volume)
        folder.mkdir(parents=True)
        self._write(folder, files)
        self._live.append((folder, volume))
        return folder

    def _host_path(self, volume: Object) -> Path:
        folder: Path = self._places.node / volume["path"].strip("/")
        kind = volume.get("type", "")
        if kind == "DirectoryOrCreate" or (not kind and not folder.exists()):
            folder.mkdir(parents=True, exist_ok=True, mode=0o755)
        elif not folder.exists():
            raise ConfigError(f"hostPath {volume['path']} (type {kind or 'any'}) is not on the node")
        return folder

    def _give(self, folder: Path) -> None:
        if self._group is not None:
            os.chown(folder, -1, self._group)
            folder.chmod(folder.stat().st_mode | 0o2070)

    # ------------------------------------------------------------ files

    def _files(self, volume: Object) -> dict[str, tuple[bytes, int]]:
        """Return path -> content and mode."""
        if "projected" in volume:
            found: dict[str, tuple[bytes, int]] = {}
            mode = volume["projected"].get("defaultMode", 0o644)
            for source in volume["projected"].get("sources", []):
                found |= self._source(source, mode)
            return found
        return self._source(volume, 0o644)

    def _source(self, source: Object, mode: int) -> dict[str, tuple[bytes, int]]:
        if "downwardAPI" in source:
            items = source["downwardAPI"].get("items", [])
            return {
                one["path"]: (field(self._pod, one["fieldRef"]["fieldPath"]).encode(), mode) for one in items
            }
        if "configMap" not in source and "secret" not in source:
            raise ConfigError(f"volume {source}: its kind is not in this stand-in")
        plural = "configmaps" if "configMap" in source else "secrets"
        reference = source.get("configMap") or source["secret"]
        name = reference.get("name") or reference["secretName"]
        mode = reference.get("defaultMode", mode)
        one = self._lookup(plural, name)
        if one is None:
            if reference.get("optional"):
                return {}
            raise ConfigError(f'{plural[:-1]} "{name}" not found')
        data = content(one)
        if "items" not in reference:
            return {key: (value, mode) for key, value in data.items()}
        if absent := [item["key"] for item in reference["items"] if item["key"] not in data]:
            raise ConfigError(f'{plural[:-1]} "{name}" has no key {absent[0]!r}')
        return {item["path"]: (data[item["key"]], item.get("mode", mode)) for item in reference["items"]}

    def _write(self, folder: Path, files: dict[str, tuple[bytes, int]]) -> None:
        if self._written.get(folder) == files:
            return
        new = folder / f"..{uuid.uuid4().hex[:8]}"
        for path, (data, wanted) in files.items():
            target = new / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
            if self._group is not None:
                os.chown(target, 0, self._group)
            target.chmod(wanted if self._group is None else wanted | 0o440)
        new.mkdir(exist_ok=True)
        link, old = folder / DATA, (folder / DATA).resolve()
        (folder / "..next").symlink_to(new.name)
        (folder / "..next").rename(link)
        for top in {path.split("/")[0] for path in files}:
            if not (folder / top).is_symlink():
                (folder / top).symlink_to(f"{DATA}/{top}")
        if old.name.startswith("..") and old != link:
            shutil.rmtree(old, ignore_errors=True)
        self._written[folder] = files

"""Runs a Dockerfile's own instructions in a clean Debian root, without a container engine, and then the image itself.

    scripts/install test
    sudo .venv/bin/python docker/prove.py docker/Dockerfile.cpu --root /var/tmp/image

The root file system is made by debootstrap (the release that FROM names). RUN, COPY, ENV, ARG, WORKDIR and USER are
carried out as they stand in the file; then ENTRYPOINT and CMD are started as the file's user, its HEALTHCHECK is asked
until it says healthy, and one request is answered. Not shown: FROM's exact image, layers, the engine's network.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shlex
import shutil
import signal
import socket
import string
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from dockerfile_parse import DockerfileParser

CONTEXT = Path(__file__).resolve().parents[1]
# proc, sys and dev as an engine gives them; in a mount namespace of its own, so that nothing stays mounted.
MOUNTS = (
    'mount --make-rprivate / && mount -t proc proc "$1/proc" && mount --rbind /sys "$1/sys" '
    '&& mount --rbind /dev "$1/dev" && shift && exec "$@"'
)


class Image:
    """A root file system and what the instructions so far have said about processes in it."""

    def __init__(self, root: Path, arguments: dict[str, str]) -> None:
        self.root, self.arguments = root, arguments
        self.env = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
        self.declared: dict[str, str] = {}
        self.workdir, self.user = "/", "0"
        self.healthcheck: list[str] = []
        self.entrypoint: list[str] = []
        self.command: list[str] = []

    def process(self, argv: list[str], *, building: bool) -> list[str]:
        """The command line that runs `argv` inside, as the present user in the present folder."""
        lines = (self.root / "etc" / "passwd").read_text().splitlines()
        entries = [line.split(":") for line in lines]
        _, _, uid, gid, _, home, _ = next(entry for entry in entries if self.user in (entry[0], entry[2]))
        env = {"HOME": home, **(self.declared if building else {}), **self.env}
        inside = ["env", "-i", *(f"{name}={value}" for name, value in env.items())]
        inside += ["sh", "-c", 'cd "$0" && exec "$@"', self.workdir, *argv]
        outside = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", MOUNTS, "sh", str(self.root)]
        return [*outside, "chroot", f"--userspec={uid}:{gid}", str(self.root), *inside]

    def apply(self, instruction: str, value: str) -> None:
        """Carries out one instruction. Raises ValueError for one that this script does not know."""
        match instruction:
            case "RUN" if not value.startswith("--"):
                subprocess.run(self.process(["/bin/sh", "-c", value], building=True), check=True, stdout=sys.stderr)
            case "COPY":
                self._copy(shlex.split(value))
            case "ENV":
                for pair in shlex.split(value):
                    name, _, said = pair.partition("=")
                    self.env[name] = string.Template(said).safe_substitute(self.env)
            case "ARG":
                name, _, default = value.partition("=")
                if (given := self.arguments.get(name, default)) or "=" in value:
                    self.declared[name] = given
            case "WORKDIR":
                self.workdir = os.path.join(self.workdir, value)
                self._inside(self.workdir).mkdir(parents=True, exist_ok=True)
            case "USER":
                self.user = value
            case "VOLUME" | "EXPOSE" | "LABEL":
                pass  # the engine's: nothing in the root file system
            case "HEALTHCHECK":
                self.healthcheck = json.loads(value.partition(" CMD ")[2])
            case "ENTRYPOINT":
                self.entrypoint = json.loads(value)
            case "CMD":
                self.command = json.loads(value)
            case _:
                raise ValueError(f"{instruction} {value}: this script does not know how to carry it out")

    def _copy(self, words: list[str]) -> None:
        *sources, target = words
        for source in sources:
            if source.startswith("--"):
                raise ValueError(f"COPY {source}: this script does not know how to carry it out")
            where = self._inside(os.path.join(self.workdir, target))
            if (CONTEXT / source).is_dir():
                ignored = shutil.ignore_patterns("__pycache__")
                shutil.copytree(CONTEXT / source, where, dirs_exist_ok=True, ignore=ignored)
            else:
                where = where / Path(source).name if target.endswith("/") else where
                where.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(CONTEXT / source, where)

    def _inside(self, path: str) -> Path:
        return self.root / path.lstrip("/")

    def healthy(self) -> bool:
        asked = subprocess.run(self.process(self.healthcheck, building=False), capture_output=True, check=False)
        return asked.returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dockerfile", type=Path)
    parser.add_argument("--root", type=Path, required=True, help="folder to make; it must not exist")
    parser.add_argument("--build-arg", action="append", default=[], metavar="NAME=VALUE")
    what = "put into the root before the first instruction: this network's certificates, pip.conf"
    parser.add_argument("--from-host", action="append", default=[], metavar="PATH", type=Path, help=what)
    parser.add_argument("--timeout", type=float, default=900, help="seconds until the image must be healthy")
    args = parser.parse_args()
    if os.geteuid() != 0:
        parser.error("chroot needs root")
    if args.root.exists():
        parser.error(f"{args.root} exists already")
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", 8000)) == 0:
            parser.error("something listens on port 8000 of this machine")
    instructions = [
        (step["instruction"], step["value"])
        for step in DockerfileParser(fileobj=io.BytesIO(args.dockerfile.read_bytes()), env_replace=False).structure
        if step["instruction"] != "COMMENT"
    ]
    image = Image(args.root, dict(pair.split("=", 1) for pair in args.build_arg))
    (_, base), *steps = instructions
    _bootstrap(base, args.root, args.from_host)
    for number, (instruction, value) in enumerate(steps, 2):
        start = time.monotonic()
        print(f"[{number}/{len(instructions)}]", instruction, " ".join(value.split()), flush=True)
        image.apply(instruction, value)
        if instruction == "RUN":
            print(f"    {time.monotonic() - start:.0f} s", flush=True)
    return _run(image, args.timeout)


def _bootstrap(base: str, root: Path, from_host: list[Path]) -> None:
    release = {"debian:12": "bookworm", "debian:13": "trixie"}.get(base.partition(".")[0])
    if release is None:
        raise SystemExit(f"FROM {base}: only Debian's own images can be made by debootstrap")
    print(f"[1] FROM {base}: debootstrap --variant=minbase {release}", flush=True)
    subprocess.run(["debootstrap", "--variant=minbase", release, str(root)], check=True, stdout=subprocess.DEVNULL)
    for path in (Path("/etc/resolv.conf"), Path("/etc/hosts"), *from_host):
        target = root / str(path).lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            shutil.copytree(path, target, dirs_exist_ok=True)
        else:
            target.unlink(missing_ok=True)
            shutil.copy(path, target)


def _run(image: Image, timeout: float) -> int:
    """Starts the image. Returns 0 where it became healthy and answered under the promise."""
    if image.healthy():
        print("HEALTHCHECK says healthy before the server was started", flush=True)
        return 1
    print(f"ENTRYPOINT+CMD {shlex.join(image.entrypoint + image.command)} as user {image.user}", flush=True)
    start = time.monotonic()
    server = subprocess.Popen(
        image.process(image.entrypoint + image.command, building=False), start_new_session=True, stdout=sys.stderr
    )
    try:
        while not image.healthy():
            if server.poll() is not None or time.monotonic() - start > timeout:
                print(f"not healthy after {time.monotonic() - start:.0f} s", flush=True)
                return 1
            time.sleep(2)
        print(f"healthy after {time.monotonic() - start:.0f} s", flush=True)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        body = {"model": image.command[0], "prompt": "The sea", "max_tokens": 8, "deterministic": "require"}
        request = urllib.request.Request(
            "http://127.0.0.1:8000/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with opener.open(request) as response:
            answer = json.load(response)
        print(answer["system_fingerprint"], json.dumps(answer["choices"][0]["text"]), flush=True)
        return 0
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


if __name__ == "__main__":
    sys.exit(main())

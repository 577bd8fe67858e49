# SPDX-License-Identifier: Apache-2.0
"""kvctl against real ledgers and real members."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, TimeoutError
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from kvcached_core._core import Ledger, LedgerRefused
from kvcached_core.cli import kvctl
from kvcached_core.cli.values import parse_address, parse_duration, parse_percent, printable
from kvcached_core.sleep.host_file import HostFile
from tests.support.ledger_locks import MEMBER_BYTES, MUTEX_BYTE, set_lock
from tests.support.ledger_member import MIB, member

KVCTL = (sys.executable, "-m", "kvcached_core.cli.kvctl")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    made = tmp_path / "ledgers"
    made.mkdir(mode=0o700)
    return made


@dataclass
class Outcome:
    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Ctl = Callable[..., Outcome]


@pytest.fixture
def ctl(directory: Path, capsys: pytest.CaptureFixture[str]) -> Ctl:
    def run(*args: str) -> Outcome:
        status = kvctl.main([*args, "--ledger-dir", str(directory)])
        captured = capsys.readouterr()
        return Outcome(status, captured.out, captured.err)

    return run


def host(directory: Path, name: str = "0") -> Path:
    return directory / f"host-{name}.ledger"


# -- looking --------------------------------------------------------------------------------------


def test_list_and_show(directory: Path, ctl: Ctl) -> None:
    spec = {"live": 30 * MIB, "parked": 20 * MIB, "cached": 10 * MIB, "guarantee": 5 * MIB}
    with member(host(directory), name="a", **spec) as process, member(host(directory), name="b"):
        found = ctl("list", "--json")
        assert found.status == 0
        assert found.json["schema"] == 1
        (ledger,) = found.json["ledgers"]
        assert ledger["key"] == "host-0"
        assert ledger["capacity_bytes"] == 1024 * MIB
        assert ledger["leased_bytes"] == 60 * MIB
        assert ledger["available_bytes"] == Ledger(host(directory)).available()
        first, second = ledger["members"]
        assert (first["name"], first["pid"], first["alive"]) == ("a", process.pid, True)
        assert (first["guarantee_bytes"], first["limit_bytes"]) == (5 * MIB, None)
        assert (first["parked_bytes"], first["cached_bytes"]) == (20 * MIB, 10 * MIB)
        assert second["name"] == "b"

        text = ctl("list")
        assert text.status == 0
        assert "host-0" in text.out
        assert "60.0 MiB" in text.out

        only = ctl("list", "b", "--json").json["ledgers"][0]
        assert [entry["name"] for entry in only["members"]] == ["b"]
        assert only["leased_bytes"] == 60 * MIB  # sums are the ledger's in any case

        shown = ctl("show", "#0", "--json").json["members"]
        assert [entry["name"] for entry in shown] == ["a"]
        assert set(shown[0]["times"]) == {"map", "step", "wait", "reclaim"}
        assert "20.0 MiB parked" in ctl("show", "a").out


def test_looking_does_not_reap(directory: Path, ctl: Ctl) -> None:
    with member(host(directory), name="a", live=10 * MIB) as process:
        process.kill()
        process.wait()
        for _ in range(2):
            entry = ctl("list", "--json").json["ledgers"][0]["members"][0]
            assert (entry["name"], entry["alive"], entry["leased_bytes"]) == ("a", False, 10 * MIB)
        assert "dead" in ctl("list").out


def test_no_ledger(ctl: Ctl) -> None:
    assert ctl("list").status == 0
    assert ctl("list", "--json").json["ledgers"] == []
    for command in (("show", "a"), ("limit", "a", "1GiB"), ("export",), ("events",)):
        refused = ctl(*command)
        assert refused.status == 1
        assert "start an engine" in refused.err


def test_damaged_ledger_is_shown_and_can_be_deleted(directory: Path, ctl: Ctl) -> None:
    path = host(directory, "bad")
    path.write_bytes(b"nonsense" * 100)
    path.chmod(0o600)
    with member(host(directory), name="a"):
        ledgers = {entry["key"]: entry for entry in ctl("list", "--json").json["ledgers"]}
        assert "not a ledger" in ledgers["host-bad"]["error"]
        assert ledgers["host-0"]["error"] is None
        assert "not a ledger" in ctl("show", "unknown").err
        assert ctl("show", "a").status == 0
        assert ctl("delete", "--ledger", "host-bad").status == 0
    assert not path.exists()


def test_names_cannot_drive_the_terminal(directory: Path, ctl: Ctl) -> None:
    ledger = Ledger(host(directory), 1024 * MIB)
    held = ledger.join("evil[red]XYZ")
    # The ledger takes no such name; whoever writes to the file could.
    data = host(directory).read_bytes()
    with host(directory).open("r+b") as file:
        file.seek(data.index(b"XYZ"))
        file.write(b"\x1b[2")
    assert "\x1b" not in ctl("list").out
    assert "evil[red]?[2" in ctl("list").out
    held.leave()


# -- policy ---------------------------------------------------------------------------------------


def test_limit_waits_until_the_member_complied(directory: Path, ctl: Ctl) -> None:
    with member(host(directory), name="a", live=100 * MIB, parked=100 * MIB, cached=100 * MIB):
        done = ctl("limit", "a", "150MiB", "--json")
        assert (done.status, done.err) == (0, "")
        (change,) = done.json["changes"]
        assert done.json["acknowledged"] and change["acknowledged"]
        assert (change["old"], change["new"]) == (None, 150 * MIB)
        assert change["observed_version"] >= change["version"]
        info = Ledger(host(directory)).members()[0]
        assert (info.limit, info.leased) == (150 * MIB, 150 * MIB)

        assert ctl("limit", "a", "25%").status == 0
        assert Ledger(host(directory)).members()[0].limit == 256 * MIB
        assert ctl("limit-percent", "a", "12.5").status == 0
        assert Ledger(host(directory)).members()[0].limit == 128 * MIB
        text = ctl("limit", "a", "unlimited")
        assert "limit none (was 128.0 MiB), in effect" in text.out
        assert Ledger(host(directory)).members()[0].limit is None


def test_each_policy_field(directory: Path, ctl: Ctl) -> None:
    with member(host(directory), name="a"):
        for command, value in (
            ("guarantee", "10%"),
            ("weight", "300"),
            ("priority", "7"),
            ("cache", "64MiB"),
        ):
            assert ctl(command, "a", value).status == 0
        info = Ledger(host(directory)).members()[0]
        assert info.guarantee == int(1024 * MIB * 0.1)
        assert (info.weight, info.priority, info.cache_limit) == (300, 7, 64 * MIB)
        assert ctl("guarantee", "a", "none").status == 0
        assert ctl("cache", "a", "none").status == 0
        info = Ledger(host(directory)).members()[0]
        assert (info.guarantee, info.cache_limit) == (0, None)


def test_deaf_member_times_out(directory: Path, ctl: Ctl) -> None:
    with member(host(directory), name="a", live=100 * MIB, deaf=True):
        begin = time.monotonic()
        late = ctl("limit", "a", "50MiB", "--timeout", "200ms", "--json")
        assert 0.2 <= time.monotonic() - begin < 5
        assert late.status == 3
        assert late.json["acknowledged"] is False
        assert "50.0 MiB more than its limit" in late.err
        assert "--timeout" in late.err
        assert Ledger(host(directory)).members()[0].limit == 50 * MIB  # in force all the same

        begin = time.monotonic()
        sent = ctl("limit", "a", "40MiB", "--no-wait", "--json")
        assert time.monotonic() - begin < 1
        assert sent.status == 0
        assert sent.json["acknowledged"] is False

        trimmed = ctl("trim", "a", "--timeout", "100ms")
        assert trimmed.status == 3
        assert "trim is pending" in trimmed.err


def test_member_dies_before_it_complied(directory: Path, ctl: Ctl) -> None:
    with member(host(directory), name="a", live=100 * MIB, deaf=True) as process:
        command = [*KVCTL, "limit", "a", "1MiB", "--ledger-dir", str(directory)]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as waiting:
            while Ledger(host(directory)).members()[0].limit is None:
                time.sleep(0.01)
            process.kill()
            _, err = waiting.communicate(timeout=20)
        assert waiting.returncode == 1
        assert "died or left" in err
    assert "kvctl delete a" in ctl("limit", "a", "2MiB").err


def test_refusals(directory: Path, ctl: Ctl) -> None:
    with (
        member(host(directory), name="a", guarantee=600 * MIB),
        member(host(directory), name="b"),
    ):
        below = ctl("limit", "a", "1MiB")
        assert below.status == 1
        assert "guarantee" in below.err
        full = ctl("guarantee", "b", "500MiB")
        assert full.status == 1
        assert "a" in full.err and "guarantee" in full.err
        assert Ledger(host(directory)).members()[1].guarantee == 0
        unknown = ctl("limit", "c", "1MiB")
        assert unknown.status == 1
        assert "there are a, b" in unknown.err

        version = ctl("show", "b", "--json").json["members"][0]["desired_version"]
        assert ctl("weight", "b", "50", "--if-version", str(version)).status == 0
        conflict = ctl("weight", "b", "60", "--if-version", str(version))
        assert conflict.status == 1
        assert "version" in conflict.err
        assert Ledger(host(directory)).members()[1].weight == 50


@pytest.mark.parametrize(
    "args",
    [
        ("limit", "a", "much"),
        ("limit", "a", "101%"),
        ("limit-percent", "a", "many"),
        ("weight", "a", "0"),
        ("priority", "a", "101"),
        ("trim", "a", "--timeout", "soon"),
        ("export", "--listen", "here"),
        ("unknown",),
    ],
)
def test_wrong_usage(args: tuple[str, ...], directory: Path, ctl: Ctl) -> None:
    with member(host(directory), name="a"):
        assert ctl(*args).status == 2


def test_names_that_several_have(directory: Path, ctl: Ctl) -> None:
    with member(host(directory), name="a"), member(host(directory), name="a"):
        refused = ctl("limit", "a", "1MiB")
        assert refused.status == 1
        assert "'#0' or '#1'" in refused.err
        assert ctl("limit", "#1", "1MiB").status == 0
        assert [info.limit for info in Ledger(host(directory)).members()] == [None, MIB]


def test_member_of_several_ledgers(directory: Path, ctl: Ctl) -> None:
    """As a tensor-parallel engine is."""
    second = host(directory, "1")
    with member(host(directory), name="a"), member(second, name="a", capacity=512 * MIB):
        both = ctl("limit", "a", "50%", "--json")
        assert both.status == 0
        assert "2 ledgers" in both.err
        assert [change["new"] for change in both.json["changes"]] == [512 * MIB, 256 * MIB]
        one = ctl("limit", "a", "1MiB", "--ledger", "host-1")
        assert (one.status, one.err) == (0, "")
        assert Ledger(host(directory)).members()[0].limit == 512 * MIB
        assert Ledger(second).members()[0].limit == MIB
        unclear = ctl("limit", "#0", "1MiB")
        assert unclear.status == 1
        assert "--ledger" in unclear.err
        # Refused by the second, so the first is as it was.
        with member(second, name="b", capacity=512 * MIB, guarantee=300 * MIB):
            assert ctl("limit", "a", "none").status == 0
            refused = ctl("guarantee", "a", "400MiB")
            assert refused.status == 1
            assert "old value again" in refused.err
            assert Ledger(host(directory)).members()[0].guarantee == 0


# -- giving back ----------------------------------------------------------------------------------


def test_trim_and_reclaim(directory: Path, ctl: Ctl) -> None:
    with member(host(directory), name="a", live=100 * MIB, parked=50 * MIB, cached=60 * MIB):
        some = ctl("reclaim", "a", "20MiB", "--json")
        assert (some.status, some.json["trims"][0]["given_bytes"]) == (0, 20 * MIB)
        parked = ctl("trim", "a", "--json")
        assert (parked.status, parked.json["trims"][0]["given_bytes"]) == (0, 30 * MIB)
        assert Ledger(host(directory)).members()[0].cached == 60 * MIB
        cached = ctl("trim", "a", "--cached")
        assert cached.status == 0
        assert "gave back 60.0 MiB" in cached.out
        assert Ledger(host(directory)).members()[0].leased == 100 * MIB
        short = ctl("reclaim", "a", "1MiB")
        assert short.status == 1
        assert "1.0 MiB less than asked" in short.err


# -- events ---------------------------------------------------------------------------------------


def test_events(directory: Path, ctl: Ctl) -> None:
    with member(host(directory), name="a"):
        ctl("limit", "a", "1MiB")
        ctl("trim", "a")
        entries = ctl("events", "--json").json["events"]
        kinds = [entry["kind"] for entry in entries]
        assert kinds[0] == "join"
        assert {"policy", "trim"} <= set(kinds)
        assert {entry["name"] for entry in entries} == {"a"}
        last = entries[-1]["seq"]
        assert ctl("events", "--json", "--since", str(last)).json["events"] == []
        assert "policy" in ctl("events").out


def test_follow_events(directory: Path, ctl: Ctl) -> None:
    command = [*KVCTL, "events", "--follow", "--json", "--ledger-dir", str(directory)]
    # It may begin before there is a ledger.
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as following:
        assert following.stdout is not None
        with member(host(directory), name="a"):
            assert json.loads(following.stdout.readline())["kind"] == "join"
            ctl("weight", "a", "7")
            seen = json.loads(following.stdout.readline())
            assert (seen["kind"], seen["ledger"]) == ("policy", "host-0")
        following.send_signal(signal.SIGINT)
        assert following.wait(timeout=20) == 130


# -- deleting -------------------------------------------------------------------------------------


def test_delete_refuses_the_living(directory: Path, ctl: Ctl) -> None:
    with member(host(directory), name="a"):
        assert "is alive: stop it first" in ctl("delete", "a").err
        assert ctl("delete", "--ledger", "host-0").status == 1
        kept = ctl("delete", "--json")
        assert (kept.status, kept.json["kept"]) == (0, ["host-0"])
        assert host(directory).exists()


def test_delete_the_dead(directory: Path, ctl: Ctl) -> None:
    with member(host(directory), name="a"), member(host(directory), name="b", live=MIB) as dead:
        dead.kill()
        dead.wait()
        gone = ctl("delete", "b", "--json")
        assert gone.status == 0
        assert [entry["name"] for entry in gone.json["members"]] == ["b"]
        assert [info.name for info in Ledger(host(directory)).members()] == ["a"]
        assert ctl("delete", "b").status == 1
    unused = ctl("delete", "--json")
    assert (unused.status, unused.json["ledgers"]) == (0, ["host-0"])
    assert not host(directory).exists()
    # The next engine starts as on the first day.
    with member(host(directory), name="c"):
        assert ctl("show", "c").status == 0


def test_delete_takes_the_weights_of_the_dead(directory: Path, ctl: Ctl) -> None:
    weights = directory / "weights"
    used = HostFile.create(weights, 4096)
    used.publish("used")
    (weights / "left.weights").write_bytes(bytes(4096))
    Ledger(directory / "host-0.ledger", 1 << 20, 0)
    assert ctl("delete").status == 0
    assert [path.name for path in weights.iterdir()] == ["used.weights"]
    used.close()


def test_delete_races_with_joins(directory: Path, ctl: Ctl) -> None:
    """No member is ever left on a file without a name."""
    script = (
        "import sys, pathlib\n"
        "from kvcached_core._core import Ledger, VmmError\n"
        "path = pathlib.Path(sys.argv[1])\n"
        "joined = 0\n"
        "while joined < 200:\n"
        "    try:\n"
        "        member = Ledger(path, 1 << 20).join('a')\n"
        "    except VmmError as error:\n"
        "        assert 'deleted' in str(error), error\n"
        "        continue\n"
        "    held = path.stat().st_ino\n"
        "    assert member.lease(1)\n"
        "    assert path.stat().st_ino == held\n"
        "    assert any(info.leased for info in Ledger(path).members())\n"
        "    member.leave()\n"
        "    joined += 1\n"
    )
    command = [sys.executable, "-c", script, str(host(directory))]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as joining:
        deleted = 0
        while joining.poll() is None:
            done = ctl("delete", "--json")
            deleted += done.status == 0 and done.json["ledgers"] == ["host-0"]
        assert joining.stderr is not None
        assert joining.returncode == 0, joining.stderr.read()
    assert deleted


def test_delete_waits_for_one_who_joins(directory: Path) -> None:
    """A member that joins in the critical section is seen by a deletion that began before."""
    path = host(directory)
    Ledger(path, MIB)

    fd = os.open(path, os.O_RDWR)
    with ThreadPoolExecutor(1) as pool:
        set_lock(fd, fcntl.F_WRLCK, MUTEX_BYTE)
        deleting = pool.submit(Ledger.remove, path)
        with pytest.raises(TimeoutError):
            deleting.result(timeout=0.3)
        set_lock(fd, fcntl.F_RDLCK, MEMBER_BYTES + 5)
        set_lock(fd, fcntl.F_UNLCK, MUTEX_BYTE)
        with pytest.raises(LedgerRefused, match="living members"):
            deleting.result(timeout=10)
    assert path.exists()
    os.close(fd)
    Ledger.remove(path)
    assert not path.exists()


def test_symbolic_link_is_not_followed(directory: Path, ctl: Ctl, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("keep")
    host(directory).symlink_to(victim)
    refused = ctl("delete", "--ledger", "host-0")
    assert refused.status == 1
    assert "symbolic link" in refused.err
    assert victim.read_text() == "keep"
    assert ctl("list", "--json").json["ledgers"][0]["error"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_other_users_ledgers_are_refused(directory: Path, ctl: Ctl) -> None:
    Ledger(host(directory), MIB)
    os.chown(host(directory), 12345, -1)
    assert "belongs to user 12345" in ctl("delete", "--ledger", "host-0").err
    os.chown(directory, 12345, -1)
    assert "belongs to user 12345" in ctl("list", "--json").json["ledgers"][0]["error"]
    assert host(directory).exists()


# -- the program ----------------------------------------------------------------------------------


def test_serves_the_export(directory: Path) -> None:
    command = [*KVCTL, "export", "--listen", "127.0.0.1:0", "--ledger-dir", str(directory)]
    with (
        member(host(directory), name="a", live=MIB),
        subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server,
    ):
        assert server.stderr is not None
        address = server.stderr.readline().split()[-1]
        with urllib.request.urlopen(address, timeout=10) as answer:
            text = answer.read().decode()
        series = 'kvcached_member_leased_bytes{ledger="host-0",member="a",slot="0"}'
        assert f"{series} 1.048576e+06" in text
        taken = address.removeprefix("http://").removesuffix("/metrics")
        again = subprocess.run([*command, "--listen", taken], capture_output=True, text=True)
        assert again.returncode == 1
        assert f"cannot listen on {taken}" in again.stderr
        server.send_signal(signal.SIGINT)
        assert server.wait(timeout=20) == 130


def test_export(directory: Path, ctl: Ctl) -> None:
    with member(host(directory), name="a", live=MIB):
        assert 'kvcached_member_leased_bytes{ledger="host-0"' in ctl("export").out
        samples = ctl("export", "--json").json["samples"]
        assert {"name", "labels", "value"} == set(samples[0])


def test_watch_prints_a_frame(directory: Path, ctl: Ctl) -> None:
    with member(host(directory), name="a", live=MIB):
        assert "host-0" in ctl("watch", "--once").out
        assert ctl("watch", "--once", "--json").json["ledgers"][0]["key"] == "host-0"


def test_completion(directory: Path) -> None:
    if shutil.which("bash") is None:
        pytest.skip("no bash")
    with member(host(directory), name="engine-a"), member(host(directory), name="other"):
        env = os.environ | {
            "_KVCTL_COMPLETE": "complete_bash",
            "COMP_WORDS": "kvctl limit eng",
            "COMP_CWORD": "2",
            "KVCACHED_LEDGER_DIR": str(directory),
        }
        done = subprocess.run(KVCTL, env=env, capture_output=True, text=True, check=False)
        assert done.stdout.split() == ["engine-a"]


def test_engines_do_not_import_the_tools() -> None:
    code = (
        "import sys, kvcached_core, kvcached_core.export, kvcached_core.cli\n"
        "print([name for name in ('typer', 'click', 'rich') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_values() -> None:
    assert [parse_duration(text) for text in ("10s", "500ms", "2m", "3")] == [10, 0.5, 120, 3]
    assert parse_address("[::1]:80") == ("::1", 80)
    assert parse_address("80") == ("127.0.0.1", 80)
    assert parse_address(":80") == ("127.0.0.1", 80)
    assert parse_percent("25%") == parse_percent("25")
    assert printable("a\x1b[2Jb\n") == "a?[2Jb?"
    for parse, text in ((parse_duration, "-1s"), (parse_address, "x:y"), (parse_percent, "101")):
        with pytest.raises(ValueError):
            parse(text)

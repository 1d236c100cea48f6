"""Laws of a bucket and of the lease in it, held on a server of this machine through the official client."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import fake_gcs
import pytest

from phased_ift_jax import lease as lease_module
from phased_ift_jax import object_store
from phased_ift_jax.lease import LEASE, Lease, LeaseLost, holder
from phased_ift_jax.object_store import Changed, Objects, StoreError
from phased_ift_jax.records import UserError


@pytest.fixture
def gcs(monkeypatch) -> Iterator[fake_gcs.FakeGCS]:
    with fake_gcs.serving("bucket") as server:
        for name, value in fake_gcs.environment(server).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(object_store, "PATIENCE", 4.0)
        monkeypatch.delenv("PHASED_IFT_RUN_ID", raising=False)
        object_store._client.cache_clear()
        yield server
        object_store._client.cache_clear()


@pytest.fixture
def objects(gcs) -> Objects:
    return Objects("gs://bucket/runs/one")


def test_what_is_written_is_listed_and_read(objects, gcs, tmp_path):
    """All of it, however many pages and whatever the sizes; a neighbour whose name begins alike is another's."""
    contents = {f"a/{number:03}": bytes([number]) * number for number in range(2 * fake_gcs.PAGE + 1)} | {"large": b"0123456789" * 1_000_000}
    (tmp_path / "in").mkdir()
    for name, content in contents.items():
        (tmp_path / "in" / name.replace("/", "-")).write_bytes(content)
    objects.upload((name, tmp_path / "in" / name.replace("/", "-")) for name in contents)
    Objects("gs://bucket/runs/one-more").write("x", b"not ours")
    listed = objects.list()
    assert {name: facts.size for name, facts in listed.items()} == {name: len(content) for name, content in contents.items()}
    assert all(facts.crc32c == object_store.crc32c(contents[name]) for name, facts in listed.items())
    assert all(abs(facts.updated - time.time()) < 60 for facts in listed.values())
    objects.download((name, tmp_path / "out" / name) for name in contents)
    assert all((tmp_path / "out" / name).read_bytes() == content for name, content in contents.items())
    assert objects.list("a/00").keys() == {f"a/00{number}" for number in range(10)}
    assert objects.is_folder("a")
    assert not objects.is_folder("a/00")
    assert objects.read("a/003") == b"\3\3\3"
    assert objects.read("nothing") is None
    assert objects.facts("nothing") is None
    objects.delete([*contents, "nothing"])
    assert objects.list() == {}
    assert gcs.objects() == {"runs/one-more/x": b"not ours"}


def test_a_write_holds_over_one_generation_only(objects):
    first = objects.write("x", b"one", over=0)
    with pytest.raises(Changed, match="'gs://bucket/runs/one/x' was written by another process meanwhile"):
        objects.write("x", b"two", over=0)
    second = objects.write("x", b"two", over=first)
    with pytest.raises(Changed):
        objects.write("x", b"three", over=first)
    objects.delete({"x": first})
    assert objects.read("x") == b"two", "a removal of another generation removes nothing"
    objects.delete({"x": second})
    assert objects.read("x") is None


def test_of_many_writers_of_one_name_one_wins(objects):
    won: list[int] = []

    def write(number: int) -> None:
        with contextlib.suppress(Changed):
            objects.write("x", f"{number}".encode(), over=0)
            won.append(number)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [objects.read("x")] == [f"{number}".encode() for number in won]


@pytest.mark.parametrize("status", [503, 429, 0])
def test_a_passing_fault_is_not_noticed(objects, gcs, status):
    """Whether the store is busy or the connection is lost before it has answered."""
    gcs.fail("bucket/runs/one", status, times=2)
    objects.write("x", b"one", over=0)
    gcs.fail("bucket/runs/one", status, times=2)
    assert objects.read("x") == b"one"
    gcs.fail("bucket/runs/one", status, times=2)
    assert objects.list().keys() == {"x"}


def test_an_answer_that_is_lost_is_no_defeat(objects, gcs):
    """The write is done and the connection cut; the client writes again over a generation that its own first attempt has made old."""
    generation = objects.write("x", b"one", over=0)
    gcs.fail("POST bucket/runs/one/x", -1, times=1)
    later = objects.write("x", b"two", over=generation)
    assert gcs.asked.count("POST bucket/runs/one/x") == 3
    objects.write("x", b"three", over=later)


def test_a_fault_that_stays_is_one_line(objects, gcs, monkeypatch):
    monkeypatch.setattr(object_store, "PATIENCE", 1.0)
    gcs.fail("POST", 503)
    with pytest.raises(StoreError, match=r"^'gs://bucket/runs/one/x' cannot be written: ") as caught:
        objects.write("x", b"one")
    assert "503" in str(caught.value)
    assert "\n" not in str(caught.value)
    gcs.faults.clear()
    with pytest.raises(StoreError, match=r"^'gs://nowhere/run' cannot be listed: no such bucket or object \(HTTP 404\)$"):
        Objects("gs://nowhere/run").list()
    gcs.fail("LIST", 403)
    with pytest.raises(StoreError, match=r"^'gs://bucket/runs/one' cannot be listed: these credentials may not do that \(HTTP 403\)$"):
        objects.list()


def test_damage_on_the_way_is_found(objects, gcs, tmp_path):
    """Content is compared with the CRC32C that the store tells: here one that is of other bytes."""
    objects.write("x", b"0123456789" * 100)
    real = fake_gcs.Object.crc32c
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fake_gcs.Object, "crc32c", property(lambda self: object_store.crc32c(b"other")))
        with pytest.raises(StoreError, match=r"cannot be read: .*hecksum"):
            objects.read("x")
        with pytest.raises(StoreError, match=r"cannot be read: .*hecksum"):
            objects.download([("x", tmp_path / "x")])
    assert fake_gcs.Object.crc32c is real


@pytest.mark.parametrize("address", ["gs://", "gs://bucket", "gs://bucket/", "gs:/bucket/run", "s3://bucket/run", "gs://Bucket/run", "gs://bucket//run", "gs://bucket/a/../b", "gs://bucket/a*"])
def test_what_is_no_address_is_refused(address):
    with pytest.raises(UserError, match="is neither a folder on a disk nor an address such as gs://bucket/runs/one"):
        Objects(address)


def test_without_the_client_the_line_says_what_to_install(monkeypatch):
    object_store._client.cache_clear()
    monkeypatch.setitem(sys.modules, "google.cloud", None)
    monkeypatch.setitem(sys.modules, "google.cloud.storage", None)
    with pytest.raises(UserError, match=r"gs:// needs `pip install 'phased_ift_jax\[gcs\]'`"):
        Objects("gs://bucket/run")


def test_without_credentials_the_line_says_where_they_come_from(tmp_path):
    program = "from phased_ift_jax import cli, object_store\ncli.run(lambda argv: object_store.Objects(argv[0]), ['gs://bucket/run'])"
    bare = {"HOME": str(tmp_path), "PATH": "", "NO_GCE_CHECK": "true"}
    told = subprocess.run([sys.executable, "-c", program], env=bare, capture_output=True, text=True, check=False, timeout=60, cwd=Path(__file__).parents[1])
    assert told.returncode == 2
    assert "output_dir: no credentials for gs:// are found" in told.stderr


def test_nothing_of_google_is_imported_before_it_is_needed():
    program = "import sys\nimport phased_ift_jax.training.mirror, phased_ift_jax.status\nassert not [name for name in sys.modules if name.startswith('google.cloud')]"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_a_lease_is_one_holders(objects):
    """Another is told who has it and until when; the same takes it over at once, and what had it before is fenced."""
    first = Lease(objects, "tpu-a", 60).acquire()
    line = r"^output_dir: tpu-a \(process \d+ on .*\), until 20.* unless renewed, is at work in 'gs://bucket/runs/one'; wait for it to end, or choose another output_dir$"
    with pytest.raises(UserError, match=line):
        Lease(objects, "tpu-b", 60).acquire()
    first.confirm()
    second = Lease(objects, "tpu-a", 60).acquire()
    first.check()  # it does not know yet
    with pytest.raises(LeaseLost, match=r"'gs://bucket/runs/one' was taken over by tpu-a \(process"):
        first.confirm()
    with pytest.raises(LeaseLost):
        first.check()
    first.release()
    second.confirm()
    second.release()
    assert holder(objects) is None
    Lease(objects, "tpu-b", 60).acquire().release()


def test_a_lease_expires_by_the_stores_clock(objects, gcs):
    """A machine that is gone renews nothing: its lease is another's when its time is over, and not before."""
    gone = Lease(objects, "tpu-a", 60).acquire()
    gone._ended.set()
    with pytest.raises(UserError, match="tpu-a"):
        Lease(objects, "tpu-b", 60).acquire()
    name, bucket = f"runs/one/{LEASE}", gcs.buckets["bucket"]
    bucket[name] = fake_gcs.Object(bucket[name].content, bucket[name].generation, bucket[name].updated - 61)
    assert holder(objects) is None
    other = Lease(objects, "tpu-b", 60).acquire()
    with pytest.raises(LeaseLost, match="was taken over by tpu-b"):
        gone.confirm()
    other.release()


def test_a_lease_that_is_renewed_does_not_expire(objects):
    lease = Lease(objects, "tpu-a", 0.8).acquire()
    time.sleep(2)
    with pytest.raises(UserError, match="tpu-a"):
        Lease(objects, "tpu-b", 60).acquire()
    lease.release()


def test_a_renewal_finds_that_the_run_was_taken_over(objects):
    first = Lease(objects, "tpu-a", 0.4).acquire()
    second = Lease(objects, "tpu-a", 60).acquire()
    time.sleep(1.5)
    with pytest.raises(LeaseLost):
        first.check()
    first.release()
    assert json.loads(objects.read(LEASE))["token"] == second.token, "what is fenced removes nothing"
    second.release()


def test_renewals_that_fail_lose_nothing_as_long_as_nobody_else_has_written(objects, gcs, monkeypatch):
    monkeypatch.setattr(object_store, "PATIENCE", 0.3)
    lease = Lease(objects, "tpu-a", 0.4).acquire()
    fault = gcs.fail("POST", 503)
    time.sleep(1.5)
    fault.times = 0
    lease.check()
    lease.confirm()
    lease.release()


def test_of_many_that_take_an_expired_lease_one_has_it(objects, gcs):
    Lease(objects, "gone", 60).acquire()._ended.set()
    name, bucket = f"runs/one/{LEASE}", gcs.buckets["bucket"]
    bucket[name] = fake_gcs.Object(bucket[name].content, bucket[name].generation, 0.0)
    have: list[Lease] = []

    def take(number: int) -> None:
        with contextlib.suppress(UserError):
            have.append(Lease(objects, f"tpu-{number}", 60).acquire())

    threads = [threading.Thread(target=take, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(have) == 1
    have[0].confirm()
    have[0].release()


def test_a_lease_that_cannot_be_read_is_nobodys(objects):
    objects.write(LEASE, b"what is this")
    Lease(objects, "tpu-a", 60).acquire().release()


def test_a_renewal_whose_answer_was_lost_is_ours(objects):
    """It was applied, and the store's answer never came: what stands there bears our token, and the run goes on."""
    lease = Lease(objects, "tpu-a", 60).acquire()
    said = json.loads(objects.read(LEASE))
    objects.write(LEASE, json.dumps(said | {"renewals": 99}).encode(), over=lease._generation)
    lease.confirm()
    objects.write(LEASE, json.dumps(said | {"token": "another's"}).encode())
    with pytest.raises(LeaseLost):
        lease.confirm()


def test_an_expired_lease_is_looked_at_twice(objects, gcs):
    """By a clock that is wrong a lease may look expired: one that is renewed while it is watched is not taken."""
    held = Lease(objects, "tpu-a", 60).acquire()
    watched = []

    def renew_meanwhile(seconds):
        watched.append(seconds)
        held.confirm()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lease_module.time, "sleep", renew_meanwhile)
        patch.setattr(lease_module, "refusal", lambda objects, there, me: "it lives" if len(watched) > 1 else None)
        with pytest.raises(UserError, match="it lives"):
            Lease(objects, "tpu-b", 60).acquire()
    assert watched[0] == 20
    held.check()
    held.confirm()


def test_a_holder_is_what_a_launcher_says_it_is_or_one_machines_disk(monkeypatch, tmp_path):
    monkeypatch.setenv("PHASED_IFT_RUN_ID", "my-tpu")
    assert lease_module.whoami() == "my-tpu"
    monkeypatch.delenv("PHASED_IFT_RUN_ID")
    names = []
    for disk in ("one", "one", "other"):
        monkeypatch.setenv("PHASED_IFT_WORK", str(tmp_path / disk))
        names.append(lease_module.whoami())
    assert names[0] == names[1] != names[2]
    assert "@" in names[0]

"""A save that fails, or is killed, leaves the last good checkpoint and nothing else."""

import errno
import os
import subprocess
import sys
import textwrap
import time

import pytest
import torch

from tessera.checkpoint import State, load, save
from tessera.errors import StorageError

OLD = State(weights={"w": torch.ones(3)}, step=1)
NEW = State(weights={"w": torch.zeros(30_000)}, step=2)


def run(script: str, *arguments: object) -> str:
    """Output of a Python process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def path(tmp_path):
    save(tmp_path / "f", OLD)
    return tmp_path / "f"


def assert_untouched(path, before: bytes) -> None:
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["f"]


def test_a_full_disk_leaves_the_old_file(path):
    before = path.read_bytes()
    message = run(
        """
        import resource, sys
        import torch
        from tessera.checkpoint import State, save
        from tessera.errors import StorageError

        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        for weights in ({"w": torch.zeros(30_000)}, {f"{i}": torch.zeros(9) for i in range(999)}):
            try:
                save(sys.argv[1], State(weights=weights))
            except StorageError as error:
                print(error)
        """,
        path,
    )
    assert message.count(f"could not write {path}: File too large. What stood there is") == 2
    assert_untouched(path, before)


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()])
def test_a_failure_at_any_step_leaves_the_old_file(path, monkeypatch, step, error):
    def fail(*_: object) -> None:
        raise error

    before = path.read_bytes()
    monkeypatch.setattr(os, step, fail)
    expected = StorageError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        save(path, NEW)
    assert_untouched(path, before)


def test_bytes_reach_the_disk_before_the_name_and_the_name_after(path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, n=name, r=real: (calls.append(n), r(*a))[1])
    save(path, NEW)
    assert calls == ["fsync", "replace", "fsync"]


def test_parents_are_made_links_followed_and_modes_kept(path):
    save(path.parent / "a" / "b" / "f", NEW)
    assert load(path.parent / "a" / "b" / "f").step == 2

    path.chmod(0o600)
    (path.parent / "latest").symlink_to(path)
    save(path.parent / "latest", NEW)
    assert (path.parent / "latest").is_symlink()
    assert load(path).step == 2
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_path_through_a_file_or_onto_a_directory_is_refused(path):
    before = path.read_bytes()
    for bad in (path / "g", path / "g" / "h"):
        with pytest.raises(StorageError, match=r"could not write .*(exists|Not a directory)"):
            save(bad, NEW)
    assert_untouched(path, before)
    with pytest.raises(StorageError, match="directory"):
        save(path.parent, NEW)
    assert_untouched(path, before)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_directory_is_refused(path):
    path.parent.chmod(0o500)
    with pytest.raises(StorageError, match="Permission denied"):
        save(path, NEW)
    path.parent.chmod(0o700)


def test_a_killed_writer_never_harms_the_checkpoint(tmp_path):
    path = tmp_path / "f"
    killed = run(
        """
        import os, random, signal, sys, time
        import torch
        from tessera.checkpoint import State, load, save

        torch.set_num_threads(1)
        path, rng, last = sys.argv[1], random.Random(0), 0

        def consistent(k):
            weights = {f"{i}": torch.full((50_000,), float(k)) for i in range(5)}
            return State(weights=weights, counters={"k": k}, step=k)

        save(path, consistent(0))
        for _ in range(20):
            child = os.fork()
            while child == 0:
                last += 1
                save(path, consistent(last))
            time.sleep(rng.uniform(0.02, 0.12))
            os.kill(child, signal.SIGKILL)
            assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
            state = load(path)
            assert state.step >= last and state.counters == {"k": state.step}
            assert all(bool((w == state.step).all()) for w in state.weights.values())
            last = state.step
        print(last)
        """,
        path,
    )
    assert int(killed) > 0

    leftovers = [p for p in tmp_path.iterdir() if p != path]
    (tmp_path / "other.tmp").touch()
    (tmp_path / ".tessera-00000000-0.tmp").touch()  # some other checkpoint's
    for leftover in tmp_path.iterdir():
        os.utime(leftover, (time.time() - 7200,) * 2)
    save(path, OLD)
    assert not any(p.exists() for p in leftovers)
    assert len(list(tmp_path.iterdir())) == 3

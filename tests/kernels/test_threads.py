"""The kernels' thread pool: its size, calls from several threads, forks, exits, the floating-point environment."""

import ctypes
import ctypes.util
import os
import platform
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from zerokl.kernels.cpu import _cpu

TASKS = Path("/proc/self/task")
linux = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


@pytest.fixture(autouse=True)
def same_threads_after():
    threads = _cpu.num_threads()
    yield
    _cpu.set_num_threads(threads)


def product(rows=9, seed=0):
    rng = np.random.default_rng(seed)
    x, w = rng.standard_normal((rows, 300), np.float32), rng.standard_normal((400, 300), np.float32)
    out = np.empty((rows, 400), np.float32)
    _cpu.linear_unpacked(x, w, None, out)
    return out


def run_python(code):
    """Run a script with the extension in its own process; it must end by itself, quietly and with status 0."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, ""), done
    return done.stdout


PRELUDE = """
import os, sys
import numpy as np
from zerokl.kernels.cpu import _cpu
def product():
    x, w, out = np.ones((9, 300), np.float32), np.ones((400, 300), np.float32), np.empty((9, 400), np.float32)
    _cpu.linear_unpacked(x, w, None, out)
    return bool((out == 300).all())
"""


def test_count_is_kept_and_bounded():
    for count in (1, 2, 5):
        _cpu.set_num_threads(count)
        assert _cpu.num_threads() == count
    for count in (0, -1, 1025):
        with pytest.raises(ValueError, match=r"num_threads must be in \[1, 1024\], got " + str(count)):
            _cpu.set_num_threads(count)
    assert _cpu.num_threads() == 5


@linux
def test_threads_come_with_the_first_work_and_go_with_the_setting():
    _cpu.set_num_threads(1)
    before = len(list(TASKS.iterdir()))
    _cpu.set_num_threads(4)
    assert len(list(TASKS.iterdir())) == before
    product()
    assert len(list(TASKS.iterdir())) == before + 3
    _cpu.set_num_threads(1)
    assert len(list(TASKS.iterdir())) == before


def test_more_threads_than_processors_or_items():
    expected = product()
    for count in (1, 2, 3, 16, 64):
        _cpu.set_num_threads(count)
        for _ in range(20):
            np.testing.assert_array_equal(product(), expected)


def test_calls_from_several_threads():
    _cpu.set_num_threads(2)
    expected = [product(rows=1 + i, seed=i) for i in range(4)]
    wrong = []

    def work(i):
        wrong.extend(i for _ in range(50) if not np.array_equal(product(rows=1 + i, seed=i), expected[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_count_changes_while_others_compute():
    expected = product()
    stop, wrong = threading.Event(), []

    def work():
        while not stop.is_set():
            wrong.extend([1] * (not np.array_equal(product(), expected)))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for i in range(300):
        _cpu.set_num_threads(1 + i % 4)
    stop.set()
    for thread in threads:
        thread.join(timeout=30)
        assert not thread.is_alive()
    assert not wrong


def test_idle_threads_sleep():
    _cpu.set_num_threads(4)
    product()
    time.sleep(0.02)
    before = time.process_time()
    time.sleep(0.2)
    assert time.process_time() - before < 0.1


def test_exit_after_use_is_clean():
    assert run_python(PRELUDE + "_cpu.set_num_threads(3); print(product())") == "True\n"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_forked_child_computes_and_exits():
    code = """
        import warnings
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of every fork beside threads
        _cpu.set_num_threads(3)
        good = product()
        child = os.fork()
        if child == 0:
            sys.exit(0 if product() and product() else 3)
        _, status = os.waitpid(child, 0)
        print(good, os.waitstatus_to_exitcode(status), product())
    """
    assert run_python(PRELUDE + textwrap.dedent(code)) == "True 0 True\n"


@pytest.mark.skipif(platform.machine() != "x86_64" or sys.platform != "linux", reason="sets x86 control bits")
def test_flushing_of_denormals_on_the_calling_thread_changes_nothing():
    libm = ctypes.CDLL(ctypes.util.find_library("m"))
    saved, flushing = (ctypes.c_uint32 * 8)(), (ctypes.c_uint32 * 8)()
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((9, 300), np.float32) * np.float32(1e-39), rng.standard_normal((400, 300), np.float32)
    expected, got = np.empty((9, 400), np.float32), np.empty((9, 400), np.float32)
    for threads in (1, 2):
        _cpu.set_num_threads(threads)
        _cpu.linear_unpacked(x, w, None, expected)
        assert 0 < np.abs(expected).max() < np.finfo(np.float32).tiny * 10
        libm.fegetenv(saved)
        libm.fegetenv(flushing)
        flushing[7] |= 0x8040  # MXCSR: flush results to zero, take denormals as zero
        libm.fesetenv(flushing)
        try:
            by_numpy = x * np.float32(1)
            _cpu.linear_unpacked(x, w, None, got)
        finally:
            libm.fesetenv(saved)
        np.testing.assert_array_equal(got.view(np.int32), expected.view(np.int32))
        assert not by_numpy.any()  # the negative control

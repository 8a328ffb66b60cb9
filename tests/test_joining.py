"""How several processes find each other and agree before they begin; a lost one."""

import os
import re
import subprocess
import sys

import jax
import pytest
from conftest import ROOT, free_port
from jax._src import clusters

from icae_jax import errors
from icae_jax.cli import main as cli
from icae_jax.runtime import distributed, platforms

# --- how they find each other ---


@pytest.fixture
def joined(monkeypatch):
    """What `jax.distributed.initialize` was called with; it does nothing. The machine has no
    accelerator and no Slurm.
    """
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **more: calls.append(args))
    monkeypatch.setattr(platforms.glob, "glob", lambda pattern: [])
    for name in os.environ:
        if name.startswith(
            ("SLURM_", "JAX_PLATFORMS", "JAX_COORDINATOR", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
        ):
            monkeypatch.delenv(name)
    return calls


def test_a_process_alone_joins_nothing(joined, monkeypatch):
    """Breaks when a plain machine, also with libtpu or within a Slurm allocation but not `srun`,
    waits for others.
    """
    monkeypatch.setattr(distributed.importlib.util, "find_spec", lambda name: "installed")
    distributed.start()
    distributed.start(processes=1)
    distributed.start("host:1", 1, 0)
    monkeypatch.setenv("SLURM_NTASKS", "2")
    distributed.start()
    monkeypatch.setenv("SLURM_STEP_NODELIST", "n[1-2]")
    monkeypatch.setenv("SLURM_NTASKS", "1")
    distributed.start()
    assert joined == []


def test_what_is_recognised_and_what_is_told(joined, monkeypatch):
    """Breaks when Slurm's tasks or a TPU's hosts run apart, or flags do not reach JAX."""
    distributed.start("host:1", 3, 2)
    assert joined.pop() == ("host:1", 3, 2)
    monkeypatch.setattr(distributed.importlib.util, "find_spec", lambda name: "installed")
    for chips in ("/dev/accel0", "/dev/vfio/0"):
        monkeypatch.setattr(
            platforms.glob,
            "glob",
            lambda pattern, chips=chips: [chips] if pattern[:8] == chips[:8] else [],
        )
        distributed.start()
        assert joined.pop() == (None, None, None)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    distributed.start()
    assert joined == []
    monkeypatch.setenv("SLURM_NTASKS", "2")
    monkeypatch.setenv("SLURM_STEP_NODELIST", "n[1-2]")
    distributed.start()
    assert joined.pop() == (None, None, None)
    distributed.start(processes=1)
    assert joined == []


@pytest.mark.parametrize(
    ("told", "tasks"),
    [
        (
            {"NTASKS": "4", "STEP_NUM_TASKS": "1", "STEP_NODELIST": "n1"},
            None,
        ),  # an interactive step in an allocation of four
        (
            {"NTASKS": "2", "NNODES": "2", "JOB_NODELIST": "n[1-2]"},
            None,
        ),  # the shell of salloc -N2 -n2
        ({"NTASKS": "", "STEP_NUM_TASKS": "", "STEP_NODELIST": "n1"}, None),
        ({"NTASKS": "many", "STEP_NODELIST": "n1"}, None),
        ({"NTASKS": "2(x2)", "STEP_NUM_TASKS": "-1", "STEP_NODELIST": "n1"}, None),
        (
            {"NTASKS": "8", "STEP_NUM_TASKS": "2", "STEP_NODELIST": "n[1-2]"},
            2,
        ),  # srun -n2 in an allocation of eight
        ({"NTASKS": "1", "STEP_NUM_TASKS": "2", "STEP_NODELIST": "n[1-2]"}, 2),
        ({"NTASKS": "", "STEP_NUM_TASKS": "4", "STEP_NODELIST": "n[1-2]"}, 4),
        ({"STEP_NUM_TASKS": "4", "STEP_NODELIST": "n[1-2]"}, 4),
    ],
)
def test_a_slurm_steps_own_count_decides(told, tasks, monkeypatch):
    """Breaks when a shell in an allocation waits for others that nobody starts, a step of several
    runs apart, JAX gets the allocation's count, or what is no number ends in a traceback.
    """
    monkeypatch.setattr(platforms.glob, "glob", lambda pattern: [])
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    for name, value in ({"JOB_ID": "77", "PROCID": "1", "LOCALID": "0"} | told).items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    # What Open MPI left, and a variable that was cleared by setting it to nothing, are not to be
    # taken for the cluster.
    monkeypatch.setenv("OMPI_MCA_orte_hnp_uri", "")
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "")
    started = []
    monkeypatch.setattr(
        jax.distributed, "initialize", lambda *args, **kw: started.append(resolved(*args, **kw))
    )
    distributed.start()
    assert "JAX_COORDINATOR_ADDRESS" not in os.environ
    assert started == ([("n1:61517", tasks, 1, [0])] if tasks else [])


def resolved(
    coordinator_address=None,
    num_processes=None,
    process_id=None,
    local_device_ids=None,
    cluster_detection_method=None,
    **_,
):
    """What JAX makes of what it is told, by its own reading of Slurm's variables."""
    return clusters.ClusterEnv.auto_detect_unset_distributed_params(
        coordinator_address,
        num_processes,
        process_id,
        local_device_ids,
        cluster_detection_method,
        1,
    )


@pytest.mark.parametrize(
    ("told", "named"),
    [
        ({"PROCID": ""}, r"\$SLURM_PROCID is ''"),
        ({"JOB_ID": "x", "LOCALID": "y"}, r"\$SLURM_JOB_ID is 'x', \$SLURM_LOCALID is 'y'"),
        ({"PROCID": "2"}, r"\$SLURM_PROCID is 2;"),
    ],
)
def test_what_slurm_has_wrong_is_named(told, named, joined, monkeypatch):
    """Breaks when a half-set or contradictory environment ends in a traceback, or the variable is
    not named.
    """
    for name, value in (
        {"NTASKS": "2", "STEP_NODELIST": "n[1-2]", "JOB_ID": "7", "PROCID": "0", "LOCALID": "0"}
        | told
    ).items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    with pytest.raises(errors.UserError, match=f"^Slurm: this step has 2 tasks, and {named}"):
        distributed.start()
    distributed.start(processes=1)
    assert joined == []


def test_jax_s_own_variables_count_together(joined, monkeypatch):
    """Breaks when processes that JAX's variables describe run apart, flags do not go first, or half
    of the variables is taken for all.
    """
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "host:1")
    distributed.start()  # a machine where it is always set
    assert joined == []
    for name, value in (("JAX_NUM_PROCESSES", "3"), ("JAX_PROCESS_ID", "")):
        monkeypatch.setenv(name, value)
    with pytest.raises(
        errors.UserError,
        match=r"'host:1', \$JAX_NUM_PROCESSES is '3', \$JAX_PROCESS_ID is ''; set all three",
    ):
        distributed.start()
    monkeypatch.setenv("JAX_PROCESS_ID", "2")
    distributed.start()
    assert joined.pop() == ("host:1", 3, 2)
    distributed.start("other:1", 2, 0)
    assert joined.pop() == ("other:1", 2, 0)
    distributed.start(processes=1)
    assert joined == []


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--processes", "2"], "--coordinator, --processes and --process go together"),
        (
            ["--coordinator", "host:1", "--process", "0"],
            "--coordinator, --processes and --process go together",
        ),
        (
            ["--coordinator", "host", "--processes", "2", "--process", "0"],
            "--coordinator host --processes 2 --process 0: give HOST:PORT",
        ),
        (
            ["--coordinator", "host:port", "--processes", "2", "--process", "0"],
            "--coordinator host:port",
        ),
        (["--coordinator", ":1", "--processes", "2", "--process", "0"], "--coordinator :1"),
        (
            ["--coordinator", "host:1", "--processes", "2", "--process", "2"],
            "--process 2: give .* a number from 0 below",
        ),
        (["--coordinator", "host:1", "--processes", "2", "--process", "-1"], "--process -1"),
        (["--coordinator", "host:1", "--processes", "0", "--process", "0"], "--processes 0"),
    ],
)
def test_flags_that_do_not_go_together(flags, named, joined, tmp_path, capsys):
    """Breaks when a wrong start waits for processes that never come, or reads a base first."""
    absent = ["--config.base=absent", "--config.data.train=absent"]
    assert (
        cli.main(
            [
                "train",
                "--config",
                str(ROOT / "configs" / "icae.py"),
                "--workdir",
                str(tmp_path / "w"),
                *absent,
                *flags,
            ]
        )
        == 2
    )
    err = capsys.readouterr().err
    assert (
        re.search(named, err)
        and err.count("\n") == 1
        and joined == []
        and not (tmp_path / "w").exists()
    )


def test_jax_s_refusals_say_what_to_do(joined, monkeypatch):
    """Breaks when a port in use or an unknown cluster ends in a traceback."""

    def fail(error):
        def initialize(*args, **more):
            raise error

        monkeypatch.setattr(jax.distributed, "initialize", initialize)

    fail(jax.errors.JaxRuntimeError("address in use"))
    with pytest.raises(
        SystemExit,
        match="process 0 of 2: cannot join the others at host:1: address in use; is another run",
    ):
        distributed.start("host:1", 2, 0)
    fail(ValueError("no coordinator"))
    monkeypatch.setenv("SLURM_NTASKS", "2")
    monkeypatch.setenv("SLURM_STEP_NODELIST", "n[1-2]")
    with pytest.raises(
        ValueError,
        match=r"Slurm: JAX cannot tell the processes \(no coordinator\); give --coordinator HOST:",
    ):
        distributed.start()
    fail(KeyError("SOME_VARIABLE"))  # half of what a cluster sets
    with pytest.raises(
        errors.UserError, match=r"cannot tell the processes \('SOME_VARIABLE'\); give --coordinator"
    ):
        distributed.start()


# --- how they agree ---


def test_a_process_alone_agrees_with_itself(tmp_path):
    """Breaks when a process alone waits for others or leaves marks."""
    assert (
        distributed.agreed(7) == 7
        and distributed.agreed(False) is False
        and distributed.main_after_all()
    )
    distributed.check_shared(tmp_path / "absent")
    assert distributed.gathered([1]) == [[1]] and distributed.from_main(lambda: 3) == 3
    assert list(tmp_path.iterdir()) == []


AGREE = """
import pathlib, sys
import jax
from icae_jax.errors import UserError
from icae_jax.runtime import distributed

process = int(sys.argv[2])
with distributed.ending_together(2):
    distributed.start(sys.argv[1], 2, process)
    assert distributed.agreed(10 + process) == 10 and type(distributed.agreed(3)) is int
    assert distributed.agreed(process == 0) is True and distributed.agreed(process == 1) is False
    assert distributed.main_after_all() == (process == 0)
    shared = pathlib.Path(sys.argv[3]) / "shared"
    distributed.check_shared(shared)
    assert process or list(shared.iterdir()) == []
    distributed.check_agreement({"seed": 0, "identity.data.train": "a", "shapes": [[1, 2], None]})
    distributed.check_agreement({})
    assert distributed.gathered({"é": process}) == [{"é": 0}, {"é": 1}]
    assert distributed.from_main(lambda: [7, str(process)]) == [7, "0"]
    try:
        with distributed.only_writer(shared, "--workdir") as held:
            assert held.held == (process == 0) and (shared / ".lock").exists()
            distributed.main_after_all()
            with distributed.only_writer(shared, "--workdir"):
                raise SystemExit("two hold it")
    except UserError as error:
        assert f"--workdir {shared} is in use: process " in str(error), error
    distributed.main_after_all()
    assert not (shared / ".lock").exists()
    try:
        shapes = {"shapes": [[1, 2]]} if process else {}
        distributed.check_agreement({"seed": process, "unchanged": "é" * 9, **shapes})
        raise SystemExit("a difference went unnoticed")
    except UserError as error:
        seeds = "seed: 0 in process 0, 1 in process 1"
        assert f"{seeds}; shapes: null in process 0, [[1, 2]] in process 1" in str(error), error
        assert "unchanged" not in str(error)
    distributed.check_shared(pathlib.Path(sys.argv[3]) / str(process))
"""


RESUME = """
import pathlib, sys
import jax
import numpy as np
from icae_jax.runtime import distributed
from icae_jax.training import checkpoint

with distributed.ending_together(2):
    distributed.start(sys.argv[1], 2, int(sys.argv[2]))
    mesh, spec = jax.make_mesh((2,), ("data",)), jax.sharding.PartitionSpec("data")
    everywhere = jax.sharding.NamedSharding(mesh, spec)

    def state(value):
        values = np.full(4, value, np.float32)
        return {"w": jax.make_array_from_callback((4,), everywhere, lambda i: values[i])}

    workdir, restore = pathlib.Path(sys.argv[3]), checkpoint.restore
    with checkpoint.Checkpoints(workdir) as checkpoints:
        checkpoints.save(1, state(1)), checkpoints.save(2, state(2))
    distributed.main_after_all()

    def damaged(folder, like):
        # As if one process could read a file that the other cannot.
        if sys.argv[2] == "1" and folder.name == "step_2":
            raise ValueError("DATA_LOSS: Error reading x")
        return restore(folder, like)

    checkpoint.restore = damaged
    step, got = checkpoint.resume(workdir, state(0), lambda text: print(text, file=sys.stderr))
    assert step == 1 and float(got["w"].addressable_data(0)[0]) == 1
    names = sorted(path.name for path in (workdir / "checkpoints").iterdir())
    assert names == ["damaged_step_2", "step_1"]
    with checkpoint.Checkpoints(workdir) as checkpoints:
        assert checkpoints.latest() == 1
"""

LOST = """
import os, sys
from icae_jax.runtime import distributed

with distributed.ending_together(2):
    distributed.start(sys.argv[1], 2, int(sys.argv[2]))
    distributed.agreed(1)
    if sys.argv[2] == "1":
        os._exit(9)
    distributed.agreed(1)
"""


def pair(code, *args):
    """(exit code, stderr) of two processes that run some code, given where to meet and which each
    is.
    """
    where, env = (
        f"127.0.0.1:{free_port()}",
        os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
    )
    command = [sys.executable, "-c", code, where]
    children = [
        subprocess.Popen([*command, str(i), *args], env=env, stderr=subprocess.PIPE, text=True)
        for i in range(2)
    ]
    try:
        errors = [child.communicate(timeout=120)[1] for child in children]
    finally:
        for child in children:
            child.kill()
    return [(child.returncode, err) for child, err in zip(children, errors, strict=True)]


@pytest.mark.nightly
def test_two_processes_agree_and_notice_that_their_folders_differ(tmp_path):
    """Breaks when a process goes by its own disk, two runs are taken for one because their workdirs
    have one name, or what the processes hold differs unnoticed or unnamed.
    """
    for name in ("shared", "0", "1"):
        (tmp_path / name).mkdir()
    ends = pair(AGREE, str(tmp_path))
    for i, (_, err) in enumerate(ends):
        assert (
            f"process {i} of 2: {tmp_path / str(i)} is not the same folder in processes 0 and 1; "
            "give one on a filesystem" in err
        )
    assert [code for code, _ in ends] == [2, 2] and list((tmp_path / "0").iterdir()) == []


def test_processes_go_back_to_the_same_checkpoint(tmp_path):
    """Breaks when damage that one process alone meets has them train on from different steps, or
    wait for each other for ever.
    """
    for code, err in pair(RESUME, str(tmp_path)):
        assert code == 0 and "step_2 is damaged (DATA_LOSS: Error reading x)" in err, err


def test_a_lost_process_is_no_bad_input():
    """Breaks when a launcher gives up a run of which one host died: JAX tells so by ValueError
    where it runs a program that is compiled.
    """
    (code, err), (other, _) = pair(LOST)
    assert other == 9 and code == distributed.CRASHED, err
    assert re.search(
        r"process 0 of 2: \w+Error\. If another process died, its output says why", err
    )


def test_an_error_of_a_process_alone_is_python_s():
    """Breaks when an error of one process loses its type, or ends a session that only called a
    function.
    """
    for error in (ValueError("x"), KeyError("y"), SystemExit(3)):
        with pytest.raises(type(error)), distributed.ending_together(2):
            raise error
